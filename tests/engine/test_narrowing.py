"""Forwards get narrower where that leaves room for what chunks can share; and only there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import vit_mechinterp as vmi
from tests.engine.test_common import EXPERIMENTS, SWAP, shuffled
from tests.engine.world import Counted, World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import Run
from vit_mechinterp.engine.planning.describe import describe
from vit_mechinterp.engine.rows.sharing import Sharing
from vit_mechinterp.engine.scheduling import cutting
from vit_mechinterp.engine.scheduling.pairs import pairs_of
from vit_mechinterp.errors import SpecError

Document = dict[str, Any]

N, WIDE = 12, 8
FIRST: Document = {"op": "ablate", "site": "blocks.0.resid_post", "tokens": [3]}
MUCH = ["blocks.*.mlp.post", "blocks.*.mlp.pre", "blocks.*.attn.pattern"]
IN_COMMON: dict[str, list[Document]] = {
    "equal rows": [{"name": "a", "interventions": [FIRST], "capture": MUCH}],
    "equal beginnings": [
        {"name": "a", "interventions": [FIRST, SWAP], "capture": MUCH},
        {"name": "b", "interventions": [FIRST, {**SWAP, "site": "blocks.2.attn_out"}]},
    ],
}


@pytest.fixture
def narrowing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "FEWEST_ROWS", 8)
    monkeypatch.setattr(cutting, "MOST_ROWS", 8)
    monkeypatch.setattr(cutting, "LAUNCH_WORK", {"cpu": 1, "cuda": 1})


def plan_of(world: World, documents: list[Document], **options: Any) -> vmi.Plan:
    return vmi.plan(world.vit, [Run.model_validate(document) for document in documents], world.columns, **options)


def world_of_copies() -> World:
    """The last examples show the images of the first."""
    world = World(TIMM_PLAIN, N)
    world.columns["base"][N // 2 :] = world.columns["base"][: N // 2]
    return world


@pytest.mark.usefixtures("narrowing")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_fits_with_narrow_forwards_is_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sharing, "joins_examples", False)
    world = World(TIMM_PLAIN, N)
    shuffled(world.columns)
    documents = EXPERIMENTS[name]
    narrow = plan_of(world, documents, batch_size=1)
    assert narrow.chunk < N
    memory = narrow.peak_bytes  # with one row more it would not fit
    for batch_size in (1, 2, WIDE):
        plan = plan_of(world, documents, batch_size=batch_size, memory=memory)
        assert plan.block_evaluations == narrow.block_evaluations
        assert plan.peak_bytes <= memory
        assert "is computed once, and held" in str(plan)
    with Counted(world.module) as count:
        results = world.execute(documents, batch_size=WIDE, memory=memory)
    world.check(documents, results)
    assert count.total == narrow.block_evaluations


@pytest.mark.usefixtures("narrowing")
@pytest.mark.parametrize("name", IN_COMMON)
def test_examples_that_have_something_in_common_share_a_chunk_with_narrow_forwards(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, documents = world_of_copies(), IN_COMMON[name]
    whole = plan_of(world, documents, batch_size=WIDE)
    assert (whole.chunk, whole.width) == (N, WIDE)
    memory = plan_of(world, documents, batch_size=1).peak_bytes
    plan = plan_of(world, documents, batch_size=WIDE, memory=memory)
    assert (plan.chunk, plan.width) == (N, 1)
    assert plan.block_evaluations == whole.block_evaluations
    assert plan.peak_bytes <= memory
    with Counted(world.module) as count:
        results = world.execute(documents, batch_size=WIDE, memory=memory)
    world.check(documents, results)
    assert count.total == whole.block_evaluations
    monkeypatch.setattr(cutting, "LAUNCH_WORK", {"cpu": 10**12, "cuda": 1})
    wide = plan_of(world, documents, batch_size=WIDE, memory=memory)
    assert wide.chunk < N
    assert wide.block_evaluations > whole.block_evaluations


@pytest.mark.usefixtures("narrowing")
def test_forwards_stay_as_wide_as_asked_where_chunks_have_nothing_in_common() -> None:
    world = World(TIMM_PLAIN, N)
    documents = EXPERIMENTS["several columns"][1:2]
    memory = world.memory(documents, 1, WIDE)
    plan = plan_of(world, documents, batch_size=WIDE, memory=memory)
    assert (plan.width, plan.chunk) == (WIDE, 1)


@pytest.mark.usefixtures("narrowing")
def test_forwards_stay_as_wide_as_asked_where_no_width_leaves_room() -> None:
    world = World(TIMM_PLAIN, 4 * N)
    resample = [{"op": "ablate", "site": f"blocks.{n}.mlp.post", "method": "resample"} for n in range(3)]
    documents: list[Document] = [{"name": f"{n}", "interventions": resample[n:]} for n in range(3)]
    memory = world.memory(documents, 1, 2)
    plan = plan_of(world, documents, batch_size=2, memory=memory)
    assert (plan.width, plan.chunk) == (2, 1)
    assert "to hold what these forwards give" in str(plan)
    assert plan_of(world, documents, batch_size=2).block_evaluations < plan.block_evaluations


@pytest.mark.usefixtures("narrowing")
@pytest.mark.parametrize("name", [*EXPERIMENTS, *IN_COMMON])
def test_more_memory_and_narrower_forwards_compute_no_more(name: str) -> None:
    """Of images that repeat, within and between columns; and what is computed is what was compared."""
    world = world_of_copies()
    shuffled(world.columns)
    documents = {**EXPERIMENTS, **IN_COMMON}[name]
    least = next(
        memory for memory in range(50_000, 10**6, 2000) if (plan := _accepted(world, documents, 1, memory)) is not None
    )
    assert plan is not None
    budgets = [int(least * part) for part in (1, 1.1, 1.3, 1.7, 2.5, 4, 8)]
    computed: dict[int, list[int]] = {}
    for batch_size in (1, 2, WIDE):
        plans = [plan_of(world, documents, batch_size=batch_size, memory=memory) for memory in budgets]
        assert all(plan.peak_bytes <= memory for plan, memory in zip(plans, budgets, strict=True))
        computed[batch_size] = [plan.block_evaluations for plan in plans]
        assert computed[batch_size] == sorted(computed[batch_size], reverse=True)
    assert computed[1] == computed[2] == computed[WIDE]
    assert computed[1][0] > computed[1][-1]


def _accepted(world: World, documents: list[Document], batch_size: int, memory: int) -> vmi.Plan | None:
    try:
        return plan_of(world, documents, batch_size=batch_size, memory=memory)
    except SpecError:
        return None


@pytest.mark.parametrize("chunk", [2, 5, N])
@pytest.mark.parametrize("name", [*EXPERIMENTS, *IN_COMMON])
def test_pairs_are_those_of_the_plan(name: str, chunk: int) -> None:
    world = world_of_copies()
    shuffled(world.columns)
    schedule = world.schedule({**EXPERIMENTS, **IN_COMMON}[name], chunk, 3)
    for own in (replace(schedule, holds=False), replace(schedule, holds=chunk < N)):
        assert pairs_of(own) == describe(world.vit, own, per_example=False).block_evaluations > N
