"""Runs that do the same in other words are the same rows: computed once, with the numbers of either."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vit_mechinterp as vmi
from tests.engine.spellings import OTHER, SAME, Edits, Z, ablate, add, inject, swap, world
from tests.engine.world import Counted, World
from tests.tiny_models import TIMM_PLAIN
from tests.zoo.transformers_models import build
from vit_mechinterp import Run
from vit_mechinterp.engine import Inputs, register_operator
from vit_mechinterp.spec import OPS, Intervention, register_op


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
