"""Runs that do the same in other words are the same rows: computed once, with the numbers of either."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vit_mechinterp as vmi
from tests.engine.world import Counted, World
from tests.tiny_models import HF_VIT, N_LAYERS, TIMM_PLAIN
from tests.zoo.transformers_models import build
from vit_mechinterp import Run
from vit_mechinterp.engine import Inputs, register_operator
from vit_mechinterp.spec import OPS, Intervention, register_op

Edits = list[dict[str, Any]]

BLOCK = "blocks.1"
STREAM, Z = f"{BLOCK}.resid_post", f"{BLOCK}.attn.z"


@cache
def world() -> World:
    made = World(HF_VIT, n=3)
    made.tensors["ones"] = torch.ones_like(made.tensors["gate"])
    made.tensors["same direction"] = made.tensors["direction.32"].clone()
    made.columns["early"] = torch.tensor([[1], [2], [3]])
    made.columns["late"] = torch.tensor([[4], [5], [3]])
    return made


def swap(site: str, **fields: Any) -> dict[str, Any]:
    return {"op": "interchange", "site": site, "source": "source", **fields}


def ablate(site: str, **fields: Any) -> dict[str, Any]:
    return {"op": "ablate", "site": site, "method": "zero", **fields}


def add(site: str, **fields: Any) -> dict[str, Any]:
    return {"op": "add_direction", "site": site, "vector": "direction.32", **fields}


def inject(site: str, **fields: Any) -> dict[str, Any]:
    basis = f"basis.{8 if '.attn.' in site else 32}"
    return {"op": "inject_subspace", "site": site, "basis": basis, "source": "source", **fields}


CHOSEN = {"vector": "kinds.32"}
VECTORS = {"vectors": "rows.2.3", "source": None}

SAME: Mapping[str, tuple[Edits, Edits]] = {
    "two tokens": ([swap(STREAM, tokens=[2, 5])], [swap(STREAM, tokens=[2]), swap(STREAM, tokens=[5])]),
    "two tokens, the last first": ([swap(STREAM, tokens=[2, 5])], [swap(STREAM, tokens=[5]), swap(STREAM, tokens=[2])]),
    "tokens in pairs": (
        [swap(STREAM, tokens=[2, 5], source_tokens=[7, 1])],
        [swap(STREAM, tokens=[5], source_tokens=[1]), swap(STREAM, tokens=[2], source_tokens=[7])],
    ),
    "pairs in another order": (
        [swap(STREAM, tokens=[2, 5], source_tokens=[7, 1])],
        [swap(STREAM, tokens=[5, 2], source_tokens=[1, 7])],
    ),
    "CLS and a token of each example": (
        [ablate(STREAM, tokens="cls"), ablate(STREAM, tokens={"column": "here"})],
        [ablate(STREAM, tokens={"column": "here"}), ablate(STREAM, tokens="cls")],
    ),
    "other operations on other tokens": (
        [add(STREAM, tokens=[3]), ablate(STREAM, tokens=[6])],
        [ablate(STREAM, tokens=[6]), add(STREAM, tokens=[3])],
    ),
    "directions": ([add(STREAM, tokens=[3, 4])], [add(STREAM, tokens=[4]), add(STREAM, tokens=[3])]),
    "subspaces": ([inject(STREAM, tokens=[3, 4])], [inject(STREAM, tokens=[4]), inject(STREAM, tokens=[3])]),
    "all heads": ([swap(Z, tokens=[2])], [swap(Z, tokens=[2], heads=[3, 0, 1, 2])]),
    "heads one by one": ([swap(Z, heads=[0, 2])], [swap(Z, heads=[2]), swap(Z, heads=[0])]),
    "every head one by one": ([inject(Z)], [inject(Z, heads=[head]) for head in (1, 3, 0, 2)]),
    "heads of one token and one of another": (
        [swap(Z, tokens=[2], heads=[0, 1]), swap(Z, tokens=[5], heads=[0])],
        [swap(Z, tokens=[5, 2], heads=[0]), swap(Z, tokens=[2], heads=[1])],
    ),
    "all heads of one token and one of another": (
        [swap(Z, tokens=[2]), ablate(Z, tokens=[5], heads=[0])],
        [ablate(Z, tokens=[5], heads=[0]), *(swap(Z, tokens=[2], heads=[head]) for head in range(4))],
    ),
    "CLS and patches": ([swap(Z)], [swap(Z, tokens="patches"), swap(Z, tokens="cls")]),
    "before heads that are replaced": (
        [swap(Z, heads=[0])],
        [ablate("blocks.1.attn.q", heads=[0]), swap(Z, heads=[0])],
    ),
    "before activations that are replaced": (
        [swap("blocks.1.mlp.post")],
        [ablate("blocks.1.mlp.pre", tokens=[3]), swap("blocks.1.mlp.post")],
    ),
    "keys in another order": (
        [ablate("blocks.1.attn.pattern", keys=[1, 2])],
        [ablate("blocks.1.attn.pattern", keys=[2, 1])],
    ),
    "a gate of ones": ([inject(STREAM, tokens=[3])], [inject(STREAM, tokens=[3], gate="ones")]),
    "inside an MLP whose increment is replaced": (
        [swap("blocks.1.mlp_out")],
        [ablate("blocks.1.mlp.post", tokens=[3]), swap("blocks.1.mlp_out")],
    ),
    "before a pattern that is replaced": (
        [swap("blocks.1.attn.pattern"), ablate(Z, heads=[1])],
        [ablate("blocks.1.attn.q", heads=[1]), swap("blocks.1.attn.pattern"), ablate(Z, heads=[1])],
    ),
    "tokens that nobody reads": (
        [swap(f"blocks.{N_LAYERS - 1}.attn.z", tokens=["cls", 2])],
        [swap(f"blocks.{N_LAYERS - 1}.attn.z", tokens=[3, "cls", 4])],
    ),
    "all tokens, of which one is read": (
        [swap(f"blocks.{N_LAYERS - 1}.mlp.post", tokens="cls")],
        [swap(f"blocks.{N_LAYERS - 1}.mlp.post")],
    ),
    "means of tokens that nobody reads": (
        [ablate(f"blocks.{N_LAYERS - 1}.mlp.post", tokens=["cls", 2], method="mean")],
        [ablate(f"blocks.{N_LAYERS - 1}.mlp.post", tokens=[3, "cls"], method="mean")],
    ),
    "pairs that nobody reads": (
        [swap(f"blocks.{N_LAYERS - 1}.mlp.post", tokens=["cls"], source_tokens=[3])],
        [swap(f"blocks.{N_LAYERS - 1}.mlp.post", tokens=[2, "cls"], source_tokens=[1, 3])],
    ),
    "inside an MLP, at tokens whose increment is replaced": (
        [swap(f"{BLOCK}.mlp_out", tokens=[2, 3])],
        [ablate(f"{BLOCK}.mlp.post", tokens=[2]), swap(f"{BLOCK}.mlp_out", tokens=[2, 3])],
    ),
    "increments of tokens that are replaced": (
        [swap(f"{BLOCK}.resid_post", tokens=[2])],
        [add(f"{BLOCK}.mlp_out", tokens=[2]), swap(f"{BLOCK}.resid_post", tokens=[2])],
    ),
    "the middle of tokens that are replaced": (
        [ablate(f"{BLOCK}.resid_post", tokens=[2])],
        [add(f"{BLOCK}.resid_mid", tokens=[2]), ablate(f"{BLOCK}.resid_post", tokens=[2])],
    ),
    "before the middle of tokens that are replaced": (
        [ablate(f"{BLOCK}.resid_mid", tokens=[2])],
        [add(f"{BLOCK}.attn_out", tokens=[2]), ablate(f"{BLOCK}.resid_mid", tokens=[2])],
    ),
    "heads of tokens whose attention is replaced": (
        [ablate(f"{BLOCK}.attn_out", tokens=[2])],
        [swap(Z, tokens=[2], heads=[1]), ablate(f"{BLOCK}.attn_out", tokens=[2])],
    ),
    "what a norm gives to an MLP whose increment is replaced": (
        [ablate(f"{BLOCK}.mlp_out")],
        [add(f"{BLOCK}.ln2", tokens=[4]), ablate(f"{BLOCK}.mlp_out")],
    ),
    "what a norm gives to attention that is replaced": (
        [ablate(f"{BLOCK}.attn_out")],
        [add(f"{BLOCK}.ln1", tokens=[4]), ablate(f"{BLOCK}.attn_out")],
    ),
    "a stream that is written over by its other name": (
        [swap("blocks.2.resid_pre", tokens=[2])],
        [add(f"{BLOCK}.resid_post", tokens=[2]), swap("blocks.2.resid_pre", tokens=[2])],
    ),
    "tokens of a stream by both names": (
        [ablate(f"{BLOCK}.resid_post", tokens=[2, 5])],
        [ablate(f"{BLOCK}.resid_post", tokens=[2]), ablate("blocks.2.resid_pre", tokens=[5])],
    ),
    "a value put back by its other name": (
        [add(STREAM, tokens=[3])],
        [add(STREAM, tokens=[3]), add("blocks.0.resid_post", tokens=[2]), swap("blocks.1.resid_pre", tokens=[2], source="base")],
    ),
    "written over by two together": (
        [swap(STREAM, tokens=[2]), ablate(STREAM, tokens=[5])],
        [add(STREAM, tokens=[2, 5]), swap(STREAM, tokens=[2]), ablate(STREAM, tokens=[5])],
    ),
    "written over in part": (
        [ablate(STREAM, tokens=[2]), swap(STREAM, tokens=[5])],
        [ablate(STREAM, tokens=[2, 5]), swap(STREAM, tokens=[5])],
    ),
    "put back where nothing has changed": (
        [ablate(f"{BLOCK}.attn_out", tokens=[2])],
        [ablate(f"{BLOCK}.attn_out", tokens=[2]), swap(f"{BLOCK}.resid_mid", tokens=[5], source="base")],
    ),
    "there already": (
        [swap("blocks.1.resid_pre", tokens=[2, 5])],
        [swap("blocks.1.resid_pre", tokens=[2, 5]), swap("blocks.1.attn.q", tokens=[2])],
    ),
    "inside an MLP and where it comes out": ([swap(f"{BLOCK}.ln2", tokens=[3])], [swap(f"{BLOCK}.mlp_out", tokens=[3])]),
    "in the middle of a block and behind it": (
        [swap(f"{BLOCK}.resid_mid", tokens=[3, 4])],
        [swap(f"{BLOCK}.resid_post", tokens=[3, 4])],
    ),
    "all heads and what comes out of them": ([swap(Z, tokens=[3])], [swap(f"{BLOCK}.attn_out", tokens=[3])]),
    "all tokens, paired with others": (
        [swap(STREAM, source_tokens=["cls", *reversed(range(16))])],
        [swap(STREAM, tokens=["cls", *range(16)], source_tokens=["cls", *reversed(range(16))])],
    ),
    "pooled means of the same tokens": (
        [ablate(STREAM, tokens=[3, 4], method="mean", pool_tokens=True)],
        [ablate(STREAM, tokens=[4, 3], method="mean", pool_tokens=True)],
    ),
    "another name": (
        [add(STREAM, tokens=[3])],
        [add(STREAM, tokens=[3]) | {"vector": "same direction"}],
    ),
}
OTHER: Mapping[str, tuple[Edits, Edits]] = {
    "the middle of other tokens": (
        [swap(f"{BLOCK}.resid_post", tokens=[3])],
        [add(f"{BLOCK}.resid_mid", tokens=[2]), swap(f"{BLOCK}.resid_post", tokens=[3])],
    ),
    "values of tokens whose attention is replaced": (
        [ablate(f"{BLOCK}.attn_out", tokens=[2])],
        [ablate(f"{BLOCK}.attn.v", tokens=[2]), ablate(f"{BLOCK}.attn_out", tokens=[2])],
    ),
    "put back where something has changed": (
        [ablate(f"{BLOCK}.attn_out", tokens=[2, 5])],
        [ablate(f"{BLOCK}.attn_out", tokens=[2, 5]), swap(f"{BLOCK}.resid_mid", tokens=[5], source="base")],
    ),
    "what another one has changed on the way": (
        [add(f"{BLOCK}.mlp.post", tokens=[3]) | {"vector": "direction.40"}, swap(f"{BLOCK}.mlp_out", tokens=[4])],
        [add(f"{BLOCK}.mlp.post", tokens=[3]) | {"vector": "direction.40"}, swap(f"{BLOCK}.ln2", tokens=[3, 4])],
    ),
    "some heads and what comes out of all": (
        [swap(Z, tokens=[3], heads=[0, 1])],
        [swap(f"{BLOCK}.attn_out", tokens=[3])],
    ),
    "pairs of others": (
        [swap(STREAM, tokens=[2, 5], source_tokens=[7, 1])],
        [swap(STREAM, tokens=[2, 5], source_tokens=[1, 3])],
    ),
    "heads that read other tokens": (
        [swap(Z, tokens=[2], source_tokens=[5], heads=[0]), swap(Z, tokens=[2], source_tokens=[7], heads=[1])],
        [swap(Z, tokens=[2], source_tokens=[5], heads=[0, 1])],
    ),
    "tokens that overlap in a later example": (
        [add(STREAM, tokens={"column": "early"}), ablate(STREAM, tokens={"column": "late"})],
        [ablate(STREAM, tokens={"column": "late"}), add(STREAM, tokens={"column": "early"})],
    ),
    "keys of some": (
        [ablate("blocks.1.attn.pattern", tokens=[1], keys=[1, 2]), ablate("blocks.1.attn.pattern", tokens=[2], keys=[3])],
        [ablate("blocks.1.attn.pattern", tokens=[1, 2], keys=[1, 2])],
    ),
    "choices by other columns": (
        [add(STREAM, tokens=[3], choose={"column": "kind"}) | CHOSEN, add(STREAM, tokens=[4], choose={"column": "label"}) | CHOSEN],
        [add(STREAM, tokens=[3, 4], choose={"column": "kind"}) | CHOSEN],
    ),
    "vectors of tokens in another order": (
        [inject(STREAM, tokens=[3, 4]) | VECTORS],
        [inject(STREAM, tokens=[4, 3]) | VECTORS],
    ),
    "tokens that overlap": (
        [add(STREAM, tokens=[3, 4]), ablate(STREAM, tokens=[4])],
        [ablate(STREAM, tokens=[4]), add(STREAM, tokens=[3, 4])],
    ),
    "vectors by token": (
        [add(STREAM, tokens=[3, 4]) | {"vector": "rows.2.32"}],
        [add(STREAM, tokens=[4, 3]) | {"vector": "rows.2.32"}],
    ),
    "twice as much": ([add(STREAM, tokens=[3])], [add(STREAM, tokens=[3], alpha=2.0)]),
    "a gate": ([inject(STREAM, tokens=[3])], [inject(STREAM, tokens=[3], gate="gate")]),
    "three heads of four": ([swap(Z)], [swap(Z, heads=[0, 1, 2])]),
    "inside an MLP whose increment is replaced in part": (
        [swap("blocks.1.mlp_out", tokens=[3])],
        [ablate("blocks.1.mlp.post"), swap("blocks.1.mlp_out", tokens=[3])],
    ),
    "before scores that are not all replaced": (
        [swap("blocks.1.attn.pattern", heads=[0])],
        [ablate("blocks.1.attn.q"), swap("blocks.1.attn.pattern", heads=[0])],
    ),
    "before a pattern and values": (
        [swap("blocks.1.attn.pattern")],
        [ablate("blocks.1.attn.v"), swap("blocks.1.attn.pattern")],
    ),
    "means over other tokens": (
        [{"op": "ablate", "site": STREAM, "method": "mean", "pool_tokens": True, "tokens": [3, 4]}],
        [
            {"op": "ablate", "site": STREAM, "method": "mean", "pool_tokens": True, "tokens": [3]},
            {"op": "ablate", "site": STREAM, "method": "mean", "pool_tokens": True, "tokens": [4]},
        ],
    ),
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_what_does_the_same_is_computed_once(name: str) -> None:
    documents = [{"name": f"r{n}", "interventions": own} for n, own in enumerate({**SAME, **OTHER}[name])]
    runs = [Run.model_validate(document) for document in documents]
    tensors = world().named(documents)
    one = vmi.plan(world().vit, runs[:1], world().columns, tensors)
    both = vmi.plan(world().vit, runs, world().columns, tensors)
    with Counted(world().module) as count:
        results = world().execute(documents)
    world().check(documents, results)
    assert count.total == both.block_evaluations
    differ = float((results.logits[0] - results.logits[1]).abs().max()) / world().scale
    if name in SAME:
        assert differ == 0
        assert both.block_evaluations == one.block_evaluations
    else:
        assert differ > 1e-4
        assert both.block_evaluations > one.block_evaluations


def test_what_is_captured_inside_is_not_left_out() -> None:
    inside = "blocks.1.mlp.post"
    edits = [ablate(inside, tokens=[3]), swap("blocks.1.mlp_out")]
    document = {"name": "seen", "interventions": edits, "capture": [{"site": inside}]}
    results = world().execute([document])
    world().check([document], results)
    assert (results.captures["seen"][inside][:, 1 + 3] == 0).all()


HEADS, PATCHES = 4, 16
PLACES = {
    "resid_pre": None, "attn.q": HEADS, "attn.z": HEADS, "attn.pattern": HEADS, "attn_out": None, "mlp.post": None, "resid_post": None,
}  # fmt: skip


@st.composite
def edits_in_two_spellings(draw: Any) -> tuple[Edits, Edits]:
    """Interventions at different sites, and the same with some of them in pieces, in any order."""
    plain: Edits = []
    pieces: Edits = []
    names = draw(st.lists(st.sampled_from([f"blocks.{n}.{p}" for n in range(2) for p in PLACES]), min_size=1, max_size=3, unique=True))
    for site in names:
        n_heads = PLACES[site.split(".", 2)[2]]
        tokens = draw(st.lists(st.sampled_from(["cls", *range(PATCHES)]), min_size=1, max_size=4, unique=True))
        heads = draw(st.none() | st.lists(st.integers(0, HEADS - 1), min_size=1, unique=True)) if n_heads else None
        made = draw(st.sampled_from([swap, ablate] if n_heads or "mlp.post" in site else [swap, ablate, add, inject]))
        paired = draw(st.permutations(range(PATCHES))) if made is swap and "pattern" not in site and draw(st.booleans()) else None
        sources = dict(zip(tokens, paired, strict=False)) if paired else {}

        def edit(some: list[Any], own: list[int] | None, made: Any = made, site: str = site, sources: Any = sources) -> Any:
            fields: dict[str, Any] = {"tokens": some} | ({"heads": own} if own else {})
            return made(site, **fields, **({"source_tokens": [sources[token] for token in some]} if sources else {}))

        plain.append(edit(tokens, heads))
        by_token = [[token] for token in tokens] if draw(st.booleans()) else [draw(st.permutations(tokens))]
        own = heads or list(range(n_heads or 0))
        by_head = [[head] for head in own] if n_heads and draw(st.booleans()) else [heads]
        pieces += draw(st.permutations([edit(some, head) for some in by_token for head in by_head]))
    return plain, pieces


@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(edits_in_two_spellings())
def test_any_run_in_pieces_is_the_same_rows(both: tuple[Edits, Edits]) -> None:
    documents = [{"name": f"r{n}", "interventions": own} for n, own in enumerate(both)]
    runs, tensors = [Run.model_validate(document) for document in documents], world().named(documents)
    alone, together = (vmi.plan(world().vit, own, world().columns, tensors) for own in (runs[:1], runs))
    assert together.block_evaluations == alone.block_evaluations
    results = world().execute(documents)
    world().check(documents, results, effect=None)
    assert torch.equal(results.logits[0], results.logits[1])


@torch.no_grad()
def test_all_heads_where_an_edit_is_made_may_be_some_of_those_where_it_reads() -> None:
    vit = vmi.wrap(build("Sapiens2Model").eval())
    keys, queries = "blocks.1.attn.k", "blocks.1.attn.q"
    assert (vit.sites()[keys].shape[1], vit.sites()[queries].shape[1]) == (2, 4)
    draw = torch.Generator().manual_seed(0)
    data = {name: torch.randn(3, *vit.layout.tokens.input_shape, generator=draw) for name in ("base", "source")}
    edit = vmi.Interchange(site=keys, heads=(1, 0), source="source", source_site=queries)
    output = vmi.execute(vit, [Run(name="a", interventions=[edit])], data).logits[0]
    taken = vit.run(data["source"], capture=[queries])[1][queries][:, :, :2]
    with vit.hooks({keys: lambda value: taken}):
        wanted = vit(data["base"])
    scale = vit(data["base"]).abs().max()
    assert (output - wanted).abs().max() <= 1e-5 * scale
    assert (output - vit(data["base"])).abs().max() > 1e-2 * scale


def test_what_somebody_elses_hook_takes_out_of_a_block_is_not_shut_in() -> None:
    world = World(TIMM_PLAIN, 3)
    taken: dict[str, torch.Tensor] = {}
    block = world.module.blocks[1]
    block.attn.proj.register_forward_pre_hook(lambda module, args: taken.update(z=args[0]))
    block.register_forward_hook(lambda module, args, output: output + 0.1 * taken["z"])
    document = {"name": "a", "interventions": [ablate(Z), swap("blocks.1.attn_out")]}
    seen = {**document, "capture": [{"site": Z}]}
    output, with_capture = (world.execute([own])["a"] for own in (document, seen))
    without = world.execute([{"name": "a", "interventions": [swap("blocks.1.attn_out")]}])["a"]
    assert (output - with_capture).abs().max() <= 1e-5 * world.scale
    assert (output - without).abs().max() > 1e-2 * world.scale


def test_an_operator_of_your_own_may_look_at_its_site() -> None:
    @register_op
    class ByLayer(Intervention):
        """``h`` times one more than the layer."""

        op: Literal["by_layer"] = "by_layer"

    @register_operator(ByLayer, by_token=True)
    def by_layer(spec: ByLayer, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return h * (1 + int(spec.site.split(".")[1]))

    try:
        sites = ("blocks.0.resid_post", "blocks.1.resid_pre")
        runs = [Run(name=site, interventions=[ByLayer(site=site, tokens=(1,))]) for site in sites]
        together = vmi.execute(world().vit, runs, world().columns).logits
        alone = [vmi.execute(world().vit, [run], world().columns).logits[0] for run in runs]
        for own, wanted in zip(together, alone, strict=True):
            assert (own - wanted).abs().max() <= 1e-5 * world().scale
        assert (alone[0] - alone[1]).abs().max() > 1e-3 * world().scale
    finally:
        OPS.pop("by_layer")
