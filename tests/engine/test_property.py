"""Whatever small set of runs is drawn: the plan counts what is executed, and sharing changes no result.

Ops, sites, tokens, heads, layers, run graphs, runs without output, repeated images and examples, rows per forward, chunks and
stores are drawn; what must come out is what the oracle makes of one run at a time. Blocks are counted with hooks on them, and held against a
count of distinct rows that is made from the documents alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import vit_mechinterp as vmi
from tests.engine.world import HEAD_SITES, Counted, World, world_of
from tests.tiny_models import HF_DINOV2, N_LAYERS, TIMM_PLAIN, Tiny
from vit_mechinterp import ActivationStore, Run


@cache
def repeating(tiny: Tiny) -> World:
    """Five examples, of which one is another again, one has another's source, and one is its own source."""
    world = World(tiny, 5)
    for column in world.columns.values():
        column[3] = column[0]
    world.columns["source"][1] = world.columns["source"][0]
    world.columns["source"][4] = world.columns["base"][4]
    return world


WORLDS = st.sampled_from([TIMM_PLAIN, HF_DINOV2]).flatmap(
    lambda tiny: st.sampled_from([lambda: world_of(tiny, 5), lambda: repeating(tiny)]).map(lambda make: make())
)
TOKENS = st.sampled_from(["all", ["cls", 3], [7], "patches", {"column": "here"}, {"box": "box"}])


@st.composite
def edits(draw: Any, world: Any, readable: list[str]) -> dict[str, Any]:
    site = draw(st.sampled_from(world.sites))
    op = draw(st.sampled_from(["interchange", "interchange", "add", "subspace", "zero", "mean", "resample"]))
    edit: dict[str, Any] = {"site": site}
    if site not in ("pooled", "logits"):
        edit["tokens"] = draw(TOKENS)
    d = world.shape(site)[-1]
    if site.split(".", 2)[-1] in HEAD_SITES and draw(st.booleans()):
        edit["heads"] = [draw(st.integers(0, world.tiny.n_heads - 1))]
    source = st.sampled_from(["base", "source", *({"run": name} for name in readable)])
    match op:
        case "interchange":
            edit |= {"op": "interchange", "source": draw(source)}
        case "subspace":
            edit |= {"op": "inject_subspace", "source": draw(source), "basis": f"basis.{d}"}
            if d >= 3 and draw(st.booleans()):
                edit["gate"] = draw(st.sampled_from(["gate", "shut"]))
        case "add":
            edit |= {"op": "add_direction", "vector": f"direction.{d}", "alpha": draw(st.sampled_from([1.0, 0.0]))}
        case "zero":
            edit |= {"op": "ablate"}
        case "mean":
            edit |= {"op": "ablate", "method": "mean", "pool_tokens": draw(st.booleans())}
        case "resample":
            edit |= {"op": "ablate", "method": "resample", "seed": draw(st.integers(0, 3))}
    return edit


def going_on(run: str, layer: int) -> dict[str, Any]:
    """The edit that goes on from the whole stream of another run."""
    return {"op": "interchange", "site": f"blocks.{layer}.resid_post", "source": {"run": run}}


@st.composite
def experiments(draw: Any) -> tuple[Any, list[dict[str, Any]]]:
    world = draw(WORLDS)
    world.tensors["shut"] = torch.zeros(3)
    runs: list[dict[str, Any]] = []
    for n in range(draw(st.integers(1, 4))):
        made = st.lists(edits(world, [run["name"] for run in runs]), max_size=3)
        sites = draw(st.lists(st.sampled_from(world.sites), max_size=3, unique=True))
        base = draw(st.sampled_from(["base", "base", "source"]))
        again = draw(st.sampled_from([[], [], *(run["interventions"] for run in runs)]))
        more = draw(made) if not again or (len(again) < 4 and draw(st.booleans())) else []
        edited = [*again[: draw(st.integers(1, len(again)))], *more] if again else more
        if runs and draw(st.integers(0, 3)) == 0:
            edited = [going_on(draw(st.sampled_from(runs))["name"], draw(st.integers(0, N_LAYERS - 1))), *edited][:4]
        runs.append({"name": f"run{n}", "base": base, "interventions": edited, "capture": sites})
    read = {edit["source"]["run"] for run in runs for edit in run["interventions"] if isinstance(edit.get("source"), dict)}
    for run in runs:
        if (run["capture"] or run["name"] in read) and draw(st.integers(0, 2)) == 0:
            run["output"] = False
    return world, draw(st.permutations(runs))


@settings(
    max_examples=60,
    phases=[Phase.generate],  # a failing experiment is small, and making it smaller takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(experiments(), st.sampled_from([1, 2, 3, 4, 7, 20]), st.sampled_from([None, 1, 2, 3]), st.booleans())
def test_any_experiment(
    experiment: tuple[Any, list[dict[str, Any]]], batch_size: int, chunk: int | None, stored: bool
) -> None:
    world, documents = experiment
    runs = [Run.model_validate(document) for document in documents]
    options: dict[str, Any] = {"batch_size": batch_size}
    if chunk is not None:
        options["memory"] = world.memory(documents, chunk, batch_size, stored=stored)
    world.vit.sites()  # takes a forward, once
    with ActivationStore() if stored else nullcontext() as store:
        options["store"] = store
        plan = vmi.plan(world.vit, runs, world.columns, tensors=world.named(documents), **options)
        assert plan.chunk == 5 if chunk is None else plan.chunk < 5
        with Counted(world.module) as counted:
            results = world.execute(documents, **options)
    assert counted.total == plan.block_evaluations
    assert counted.launches == plan.launches
    assert plan.widest <= batch_size
    world.check(documents, results, effect=None)


@st.composite
def sweeps(draw: Any) -> tuple[World, list[dict[str, Any]]]:
    """Runs of one edit each, none of which reads another."""
    world = draw(WORLDS)
    sites = st.sampled_from([s for s in world.sites if s not in ("ln_final", "pooled", "logits")])
    runs = []
    for n in range(draw(st.integers(1, 8))):
        edit = {"op": "interchange", "site": draw(sites), "source": draw(st.sampled_from(["base", "source"]))}
        edit["tokens"] = draw(st.sampled_from([["cls"], ["cls", 3], {"column": "here"}, "all"]))
        runs.append({"name": f"{n}", "interventions": [edit]})
    return world, runs


def least(world: World, documents: list[dict[str, Any]]) -> int:
    """(row, block) pairs that cannot be done without: distinct rows behind the block where their edit is, and distinct
    images up to the last block that somebody reads. Nobody reads patches behind the last attention call of a model whose
    head reads CLS, and where all that is read of the residual stream is replaced, the row is the source's. A token of an
    image inside attention or MLP is that image's where it comes out."""
    out = dict.fromkeys(("attn.z", "attn.result"), "attn_out") | dict.fromkeys(("ln2", "mlp.post"), "mlp_out")
    out |= {"resid_mid": "resid_post"} | ({"mlp.pre": "mlp_out"} if "mlp.pre_linear" in world.tiny.missing else {})
    read = {0} if world.tiny is TIMM_PLAIN else set(range(world.shape("embed")[0]))
    rows: dict[Any, int] = {}
    depth: dict[bytes, int] = {}
    image = {c: [x.numpy().tobytes() for x in world.columns[c]] for c in ("base", "source")}

    def clean(which: bytes, site: str) -> None:
        layer = int(site.split(".")[1]) if site != "embed" else 0
        blocks = layer if site == "embed" or site.endswith("resid_pre") else layer + 1
        depth[which] = max(depth.get(which, 0), blocks)

    for document in documents:
        (edit,) = document["interventions"]
        site, column = edit["site"], edit["source"]
        name = site.split(".", 2)[-1]
        for i in range(5):
            base, source = image["base"][i], image[column][i]
            if base == source:
                depth[base] = N_LAYERS
                continue
            tokens = set(world.oracle.positions(edit["tokens"], i))
            layer = 0 if site == "embed" else int(site.split(".")[1])
            mixed_later = layer < N_LAYERS - 1 or name in ("embed", "resid_pre", "ln1", "attn.k", "attn.v")
            reaching = set(range(world.shape("embed")[0])) if mixed_later else read
            if not reaching & tokens:
                depth[base] = N_LAYERS
                continue
            if name in ("embed", "resid_pre", "resid_mid", "resid_post") and reaching <= tokens:
                depth[source] = N_LAYERS
                continue
            # What enters a block is what the one before puts out.
            name = out.get(name, name)
            joins_behind = name in ("resid_post", "mlp_out")
            site = f"blocks.{layer}.{name}" if "." in site else site
            place = f"blocks.{layer - 1}.resid_post" if name == "resid_pre" and layer else site
            rows[base, source, place, frozenset(reaching & tokens)] = N_LAYERS - layer - joins_behind
            clean(source, site)
            clean(base, site if joins_behind else "embed" if layer == 0 else f"blocks.{layer}.resid_pre")
    return sum(rows.values()) + sum(depth.values())


@settings(
    max_examples=30,
    phases=[Phase.generate],  # a failing experiment is small, and making it smaller takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(sweeps(), st.sampled_from([2, 5, 30]))
def test_no_pair_of_row_and_block_is_computed_in_vain(
    sweep: tuple[World, list[dict[str, Any]]], batch_size: int
) -> None:
    world, documents = sweep
    world.vit.sites()
    with Counted(world.module) as counted:
        results = world.execute(documents, batch_size=batch_size)
    assert counted.total == least(world, documents)
    world.check(documents, results, effect=None)
