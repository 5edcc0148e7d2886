"""Blocks of which all that attention and MLP add is replaced: rows step aside before them, and are back behind."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vit_mechinterp as vmi
from tests.engine.test_sharing import repeating
from tests.engine.world import Counted, World, world_of
from tests.tiny_models import HF_DINOV2, HF_VIT, MAIN, N_LAYERS, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, Tiny
from vit_mechinterp import Run

Document = dict[str, Any]
N = 3
CLEAN: Document = {"name": "clean"}


def replaced(layer: int, **fields: Any) -> list[Document]:
    """Interventions on all that a block adds to the stream."""
    options = {"op": "ablate", **fields}
    return [{**options, "site": f"blocks.{layer}.{name}"} for name in ("attn_out", "mlp_out")]


def without(*layers: int, **fields: Any) -> Document:
    """A run without some blocks."""
    edits = [edit for layer in layers for edit in replaced(layer)]
    return {"name": f"without {layers}", "interventions": edits, **fields}


def checked(world: World, documents: list[Document], **options: Any) -> list[int]:
    """Rows that pass each block, as many in all as the plan says; results are the oracle's."""
    runs = [Run.model_validate(own) for own in documents]
    plan = vmi.plan(world.vit, runs, world.columns, world.named(documents), **options)
    with Counted(world.module) as count:
        results = world.execute(documents, **options)
    world.check(documents, results, effect=None)
    assert (count.total, count.launches) == (plan.block_evaluations, plan.launches)
    return count.rows


@pytest.mark.parametrize("batch_size", [2, 64])
@pytest.mark.parametrize("tiny", MAIN, ids=lambda tiny: tiny.name)
def test_rows_pass_through_the_blocks_that_they_have_and_no_others(tiny: Tiny, batch_size: int) -> None:
    """Every set of blocks left out: the rows that pass a block differ in what was left out before it."""
    world = world_of(tiny, N)
    sets = [own for size in range(1, N_LAYERS + 1) for own in combinations(range(N_LAYERS), size)]
    expected = [len({tuple(x for x in own if x < layer) for own in [(), *sets] if layer not in own}) for layer in range(N_LAYERS)]
    rows = checked(world, [CLEAN, *(without(*own) for own in sets)], batch_size=batch_size)
    assert rows == [N * size for size in expected] == [3, 6, 12]
    clean = world.oracle.clean("base")[0]
    changes = [float((world.oracle.run(without(*own))[0] - clean).abs().max()) for own in sets]
    assert min(changes) > 1e-3 * world.scale


HOWS: dict[str, tuple[Document, int]] = {
    "zero": ({}, 0),
    "mean": ({"method": "mean"}, 0),
    "resample": ({"method": "resample"}, 0),
    "interchange": ({"op": "interchange", "source": "source"}, N),
}
"""What is put in, and how many images of other columns it is made of."""


@pytest.mark.parametrize("how", HOWS)
def test_whatever_is_put_in(how: str) -> None:
    world = world_of(TIMM_PLAIN, N)
    options, others = HOWS[how]
    assert checked(world, [CLEAN, {"name": "both", "interventions": replaced(1, **options)}]) == [N + others, N + others, 2 * N]


def test_what_is_read_of_rows_that_step_aside() -> None:
    world = world_of(TIMM_PLAIN, N)
    seen = [f"blocks.1.{name}" for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")]
    edits = [*without(0)["interventions"], *replaced(1, op="interchange", source="source"), *replaced(2)]
    document = {"name": "seen", "interventions": edits, "capture": [*seen, "blocks.2.resid_mid", "ln_final"]}
    reader: Document = {
        "name": "reader",
        "interventions": [{"op": "interchange", "site": "blocks.1.resid_mid", "source": {"run": "seen"}, "tokens": ["cls", 3]}],
    }
    assert checked(world, [CLEAN, document, reader]) == [2 * N, 3 * N, 2 * N]
    results = world.execute([document, reader])
    clean = world.oracle.clean("base")[1]
    assert all(float((own - clean[site]).abs().max()) > 1e-3 for site, own in results.captures["seen"].items())


@pytest.mark.parametrize("site", ["blocks.1.ln1", "blocks.1.attn.pattern", "blocks.1.mlp.post"])
def test_a_block_that_somebody_looks_into_runs(site: str) -> None:
    world = world_of(TIMM_PLAIN, N)
    document = without(0, 1)
    same = {**document, "name": "seen", "capture": [site]}
    assert checked(world, [CLEAN, document]) == [N, N, 2 * N]
    assert checked(world, [CLEAN, document, same]) == [N, 2 * N, 2 * N]
    other = {"name": "other", "interventions": [{"op": "ablate", "site": "blocks.0.resid_post", "tokens": [3]}], "capture": [site]}
    assert checked(world, [CLEAN, document, other]) == [N, 2 * N, 3 * N]


@pytest.mark.parametrize("site", ["blocks.1.ln1", "blocks.1.attn.pattern", "blocks.0.mlp.post"])
def test_a_block_that_is_seen_before_anything_is_replaced_is_bypassed(site: str) -> None:
    """What is captured is the clean forward's."""
    world = world_of(TIMM_PLAIN, N)
    assert checked(world, [CLEAN, {**without(1), "capture": [site]}]) == [N, N, 2 * N]
    assert checked(world, [CLEAN, without(0, 1), {**without(1), "capture": [site]}]) == [N, N, 3 * N]


def test_a_block_of_which_something_is_left_runs() -> None:
    world = world_of(TIMM_PLAIN, N)
    attention, mlp = replaced(1)
    for less in ([attention], [mlp], [{**attention, "tokens": ["cls", 3]}, mlp], [attention, {**mlp, "tokens": "patches"}]):
        document = {"name": "less", "interventions": [*replaced(0), *less]}
        assert checked(world, [CLEAN, document]) == [N, 2 * N, 2 * N]
    inside = {"op": "add_direction", "site": "blocks.1.resid_mid", "vector": f"direction.{world.module_width}"}
    document = {"name": "more", "interventions": [*replaced(0), attention, inside, mlp]}
    assert checked(world, [CLEAN, document]) == [N, N, 2 * N]


def test_the_last_block_is_bypassed_for_the_tokens_that_are_read() -> None:
    """The output reads CLS alone; hooks of others, which `Counted` has, do not keep the plan from knowing."""
    world = world_of(TIMM_PLAIN, N)
    narrow = {"name": "cls", "interventions": [*replaced(0), *replaced(2, tokens="cls")]}
    assert checked(world, [CLEAN, narrow]) == [N, 2 * N, N]
    every = {**narrow, "name": "every", "capture": ["blocks.2.resid_post"]}
    assert checked(world, [CLEAN, every]) == [N, 2 * N, 2 * N]
    assert checked(world, [CLEAN, narrow, every]) == [N, 2 * N, 2 * N]


def test_examples_in_which_something_is_put_back_go_through() -> None:
    """In the last example the source is the base, so that nothing is replaced."""
    world = repeating(TIMM_PLAIN)
    document = {"name": "both", "interventions": replaced(1, op="interchange", source="source")}
    checked(world, [CLEAN, document, without(0, 1), without(1)])


def test_bypassing_beside_rows_that_join_late() -> None:
    """Rows of other runs join, are edited and are read in blocks that some rows bypass."""
    world = world_of(TIMM_PLAIN, N)
    width = world.module_width
    late = [
        {"name": f"late {layer} {site}", "interventions": [edit], "capture": [f"blocks.{layer}.attn.z", f"blocks.{layer}.mlp.post"]}
        for layer in (1, 2)
        for site in ("attn.z", "resid_mid", "mlp_out")
        for edit in [{"op": "interchange", "site": f"blocks.{layer}.{site}", "source": "source", "tokens": ["cls", 3]}]
    ]
    push = {"name": "push", "interventions": [{"op": "add_direction", "site": "blocks.0.resid_post", "vector": f"direction.{width}"}]}
    for batch_size in (3, 7, 64):
        checked(world, [CLEAN, push, without(1), without(0, 1), *late, without(0, 2), without(2)], batch_size=batch_size)


def test_hooks_that_act_on_a_block_see_all_rows() -> None:
    world = World(TIMM_PLAIN, N)
    seen: list[int] = []
    with world.module.blocks[1].register_forward_hook(lambda module, args, output: seen.append(len(output))):
        documents = [CLEAN, without(0, 1)]
        world.check(documents, world.execute(documents), effect=None)
    assert sum(own for own in seen if own > 1) == 2 * N  # one row to find out what the output reads


@st.composite
def experiments(draw: Any) -> tuple[World, list[Document], int]:
    """Runs of blocks replaced, in part or as a whole, and of what begins, reads and is edited beside that."""
    tiny = draw(st.sampled_from([TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, HF_VIT, HF_DINOV2]))
    world = draw(st.sampled_from([world_of, repeating]))(tiny)
    hows: list[Document] = [{}, {}, {"method": "mean"}, {"op": "interchange", "source": "source"}]
    documents: list[Document] = []
    for n in range(draw(st.integers(1, 5))):
        edits: list[Document] = [*draw(st.sampled_from([[], *(own["interventions"] for own in documents)]))][:4]
        for layer in draw(st.lists(st.integers(0, N_LAYERS - 1), min_size=1, max_size=3)):
            kind = draw(st.sampled_from(["both", "both", "both", "one", "other"]))
            how = draw(st.sampled_from([*hows, *({"op": "interchange", "source": {"run": own["name"]}} for own in documents)]))
            tokens = draw(st.sampled_from(["all", "all", "all", [1, 2], [2, 3, 4]]))
            both = replaced(layer, tokens=tokens, **how)
            if kind == "other":
                site = f"blocks.{layer}.{draw(st.sampled_from(['resid_pre', 'attn.z', 'resid_mid', 'mlp.post', 'resid_post']))}"
                both = [{"op": "interchange", "site": site, "source": "source", "tokens": [0, 3]}]
            edits += both[: 1 if kind == "one" else 2]
        sites = [f"blocks.{layer}.{name}" for layer in range(N_LAYERS) for name in ("attn_out", "resid_mid", "mlp_out", "ln2", "resid_post")]
        captured = draw(st.lists(st.sampled_from(sites), max_size=2, unique=True))
        output = draw(st.booleans()) or not captured
        documents.append({"name": f"r{n}", "interventions": edits, "capture": captured, "output": output})
    return world, documents, draw(st.sampled_from([2, 5, 64]))


@given(experiments())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_any_experiment(drawn: tuple[World, list[Document], int]) -> None:
    world, documents, batch_size = drawn
    with torch.no_grad():
        checked(world, documents, batch_size=batch_size)
