"""Random valid specs, for round trips and digests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from vit_mechinterp.spec import (
    BLOCK_SITES,
    Ablate,
    AddDirection,
    Capture,
    Column,
    CrossEntropy,
    DataSource,
    Experiment,
    InjectSubspace,
    Interchange,
    Intervention,
    Run,
    RunSource,
    SelectedLogits,
    Site,
    Sweep,
    TensorRef,
    TokenBox,
    TokenColumn,
)

names = st.text("abcdefgh_-./ é:#'\"{}0", min_size=1, max_size=6).filter(lambda name: name not in {"all", "auto"})
plain_names = st.text("abcdef_", min_size=1, max_size=6)
layers = st.integers(0, 11)
sites = st.builds(Site, layers, st.sampled_from(BLOCK_SITES))
tokens = st.one_of(
    st.sampled_from(["all", "cls", "patches"]),
    st.lists(st.one_of(st.integers(0, 40), st.just("cls")), min_size=1, max_size=4).map(tuple),
    names.map(lambda name: TokenColumn(column=name)),
    names.map(lambda name: TokenBox(box=name)),
)
tensors = st.one_of(
    plain_names.map(TensorRef),
    st.builds(lambda file, key: TensorRef(f"{file}.safetensors", key), plain_names, plain_names),
    st.builds(lambda key, digit: TensorRef("a.safetensors", key, digit * 64), plain_names, st.sampled_from("09af")),
)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def interventions(draw: st.DrawFn) -> Intervention:
    """An intervention of any built-in op, at any site of a block."""
    site = draw(sites)
    common: dict[str, Any] = {"site": str(site), "tokens": draw(tokens)}
    if site.has_heads and draw(st.booleans()):
        common["heads"] = draw(st.lists(st.integers(0, 11), min_size=1, max_size=3, unique=True))
    if site.is_attention_matrix:
        common["keys"] = draw(tokens)
    source: dict[str, Any] = {
        "source": draw(st.one_of(names, names.map(lambda name: RunSource(run=name)))),
        "source_tokens": draw(st.none() | tokens),
        "source_site": draw(st.none() | layers.map(lambda layer: str(site.at(layer)))),
    }
    choose = draw(st.none() | names.map(lambda name: Column(column=name)))
    op = draw(st.sampled_from(["interchange", "add_direction", "inject_source", "inject_vectors", "ablate"]))
    if op == "interchange":
        return Interchange(**common, **source)
    if op == "add_direction":
        return AddDirection(**common, vector=draw(tensors), alpha=draw(numbers), choose=choose)
    if op == "inject_source":
        return InjectSubspace(**common, **source, basis=draw(tensors), gate=draw(st.none() | tensors))
    if op == "inject_vectors":
        return InjectSubspace(**common, basis=draw(tensors), vectors=draw(tensors), choose=choose)
    method = draw(st.sampled_from(["zero", "mean", "resample"]))
    options: dict[str, dict[str, Any]] = {
        "zero": {},
        "mean": {"mean": draw(st.none() | tensors), "pool_tokens": draw(st.booleans())},
        "resample": {"seed": draw(st.integers(0, 9))},
    }
    return Ablate(**common, method=method, **options[method])


captures = st.one_of(
    st.builds(lambda site, where: Capture(site=str(site), tokens=where), sites, tokens),
    st.sampled_from(["logits", "pooled", "blocks.*.resid_post", "blocks.[0-3].attn.*"]).map(
        lambda site: Capture(site=site)
    ),
)
lists_of_interventions = st.lists(interventions(), max_size=3).map(tuple)
runs = st.builds(
    Run, name=names, interventions=lists_of_interventions, base=names, capture=st.lists(captures, max_size=2).map(tuple)
)
sweeps = st.builds(
    Sweep,
    name=st.just("{layer}-{where}"),
    interventions=st.lists(interventions(), min_size=1, max_size=2).map(tuple),
    base=names,
    over=st.fixed_dictionaries(
        {
            "where": st.just({"here": {"tokens": TokenColumn(column="c")}, "cls": {"tokens": ["cls", 3]}}),
            "layer": st.one_of(st.just("all"), st.just(range(4)), st.just({"first": 0, "last": 11})),
        }
    ),
)
json_values = st.one_of(st.none(), st.integers(2, 99), numbers.filter(lambda x: x not in (0.0, 1.0)), names)
data_sources = st.one_of(
    st.builds(lambda folder: DataSource(saved=folder), names),
    st.builds(
        lambda name, options: DataSource(stimuli=name, options=options),
        names,
        st.dictionaries(plain_names, st.one_of(json_values, st.lists(json_values, max_size=2)), max_size=3),
    ),
)
classes = st.one_of(st.integers(0, 999), names.map(lambda name: Column(column=name)))
readouts = st.one_of(
    classes.map(lambda answer: CrossEntropy(answer=answer)),
    st.lists(classes, min_size=1, max_size=3, unique_by=lambda entry: getattr(entry, "column", str(entry))).map(
        lambda several: SelectedLogits(classes=several)
    ),
)
file_tensors = st.builds(lambda key: TensorRef("t.safetensors", key), plain_names)
experiments = st.builds(
    Experiment,
    model=st.none() | names,
    data=st.none() | data_sources,
    runs=st.lists(st.one_of(runs, sweeps), min_size=1, max_size=3).map(tuple),
    tensors=st.dictionaries(plain_names, file_tensors, max_size=2),
    batch_size=st.one_of(st.just("auto"), st.integers(1, 512)),
    readout=st.none() | readouts,
    description=names,
)
