"""What several chunks need of clean forwards: computed once where memory has room for it, and said where it has not."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.experiments import assert_same_bits, cut_small
from tests.engine.test_cutting import Held
from tests.engine.world import Counted, World
from tests.tiny_models import HF_VIT, TIMM_PLAIN
from vit_mechinterp import Run
from vit_mechinterp.engine.binding.values import origin_of
from vit_mechinterp.engine.forwards import clean_forwards
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.results import resume
from vit_mechinterp.engine.scheduling import cutting
from vit_mechinterp.engine.scheduling.footprint import footprint
from vit_mechinterp.engine.scheduling.sizes import parse_bytes

Document = dict[str, Any]

N = 12
SWAP = {
    "op": "interchange",
    "site": "blocks.1.resid_post",
    "source": "source",
    "tokens": {"column": "here"},
    "source_tokens": {"column": "there"},
}
EXPERIMENTS: dict[str, list[Document]] = {
    "resampled": [
        {"name": "clean"},
        {"name": "a", "interventions": [{"op": "ablate", "site": "blocks.1.attn_out", "method": "resample"}]},
        {"name": "b", "interventions": [SWAP], "capture": ["pooled", "embed"]},
    ],
    "means": [
        {"name": "a", "interventions": [{"op": "ablate", "site": "blocks.0.mlp_out", "method": "mean"}]},
        {
            "name": "b",
            "interventions": [
                {
                    "op": "ablate",
                    "site": "blocks.2.attn.z",
                    "method": "mean",
                    "tokens": {"column": "here"},
                    "pool_tokens": True,
                },
                SWAP,
            ],
        },
    ],
    "means in place of streams": [  # no chunk needs a base, which means are made of
        {
            "name": f"{layer}",
            "interventions": [
                {"op": "ablate", "site": f"blocks.{layer}.resid_post", "method": "mean"},
                {**SWAP, "site": "blocks.1.attn.z"},
            ],
        }
        for layer in (0, 1)
    ],
    "patterns averaged": [
        {"name": "a", "interventions": [{"op": "ablate", "site": "blocks.0.attn.pattern", "method": "mean"}]},
        {"name": "b", "interventions": [{"op": "ablate", "site": "blocks.2.resid_pre", "method": "resample", "tokens": [3]}]},
    ],
    "several columns": [
        {"name": "clean", "capture": ["blocks.2.attn_out"]},
        {"name": "a", "interventions": [SWAP]},
        {"name": "b", "base": "source", "interventions": [{**SWAP, "source": "base"}]},
    ],
}
"""By what makes chunks need the same images."""


def shuffled(columns: dict[str, Any]) -> None:
    """Half of the sources are the bases of examples in other chunks."""
    columns["source"][: N // 2] = columns["base"][N // 2 :]


@pytest.fixture(params=[TIMM_PLAIN, HF_VIT], ids=["timm", "hf"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> World:
    cut_small(monkeypatch)
    world = World(request.param, N)
    shuffled(world.columns)
    world.vit.sites()
    return world


def plan_of(world: World, documents: list[Document], **options: Any) -> vmi.Plan:
    runs = [Run.model_validate(document) for document in documents]
    return vmi.plan(world.vit, runs, world.columns, batch_size=2, **options)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_image_passes_once_where_there_is_room(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = EXPERIMENTS[name]
    cut = plan_of(world, documents)
    assert cut.chunk < N / 2
    with Counted(world.module) as count:
        results = world.execute(documents, batch_size=2)
    world.check(documents, results)
    assert count.total == cut.block_evaluations
    assert count.launches == cut.launches
    monkeypatch.undo()
    whole = plan_of(world, documents)
    assert whole.chunk == N
    assert cut.block_evaluations == whole.block_evaluations
    assert "is computed once, and held" in str(cut)
    assert "held" not in str(whole)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_images_pass_again_where_there_is_none_and_the_plan_says_what_it_would_take(world: World, name: str) -> None:
    documents = EXPERIMENTS[name]
    held = plan_of(world, documents)
    least = footprint(world.vit, replace(world.schedule(documents, 1, 1), holds=False)).peak(1, 1)
    cut = plan_of(world, documents, memory=least)
    assert cut.block_evaluations > held.block_evaluations
    assert cut.peak_bytes <= least
    with Counted(world.module) as count:
        results = world.execute(documents, batch_size=2, memory=least)
    world.check(documents, results)
    assert count.total == cut.block_evaluations
    (says,) = [note for note in cut.notes if note.startswith("to hold what these forwards give")]
    size = says.removesuffix(" of memory").rsplit(" takes ")[1]
    assert 0 < parse_bytes(size.replace(" ", "")) < held.peak_bytes
    # What the plan says is enough.
    enough = plan_of(world, documents, memory=held.peak_bytes)
    assert enough.peak_bytes <= held.peak_bytes
    assert enough.block_evaluations == held.block_evaluations
    less = plan_of(world, documents, memory=held.peak_bytes - 1)
    assert (less.chunk, less.block_evaluations) == (held.chunk - 1, held.block_evaluations)


def test_images_of_one_chunk_are_not_held(world: World) -> None:
    """Nor computed before it: chunks that have nothing in common are as if each were alone."""
    world.columns["source"] = TIMM_PLAIN.images(N, 77)
    documents = EXPERIMENTS["several columns"][:2]
    plan = plan_of(world, documents)
    assert plan.chunk < N
    assert "held" not in str(plan)
    world.check(documents, world.execute(documents, batch_size=2))


def test_selected_tokens_are_joined_with_those_of_images_of_one_chunk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = [{"site": "blocks.0.resid_post", "tokens": {"box": "box"}}, {"site": "embed", "tokens": {"column": "here"}}]
    documents = [{**document, "capture": capture} for document in EXPERIMENTS["several columns"]]
    assert "and held" in str(plan_of(world, documents))
    cut = world.execute(documents, batch_size=2)
    monkeypatch.undo()
    whole = world.execute(documents, batch_size=2)
    for name in cut.run_names:
        for site, values in whole.captures[name].items():
            pairs = list(zip(cut.captures[name][site], values, strict=True))
            assert all(one.shape == other.shape for one, other in pairs)
            assert all(float((one - other).abs().max()) < 1e-5 < float(other.abs().max()) for one, other in pairs)


@pytest.mark.parametrize("also", [{"capture": ["pooled"]}, {}], ids=["equal rows", "equal beginnings"])
def test_examples_whose_rows_have_something_in_common_share_a_chunk(
    also: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as memory goes: the last examples show the images of the first."""
    monkeypatch.setattr(cutting, "FEWEST_ROWS", 8)
    monkeypatch.setattr(cutting, "MOST_ROWS", 8)
    world = World(TIMM_PLAIN, N)
    world.columns["base"][N // 2 :] = world.columns["base"][: N // 2]
    first: Document = {"op": "ablate", "site": "blocks.0.resid_post", "tokens": [3]}
    documents: list[Document] = [{"name": "a", "interventions": [first] if also else [first, SWAP], **also}]
    together = plan_of(world, documents)
    assert together.chunk == N
    with Counted(world.module) as count:
        results = world.execute(documents, batch_size=2)
    world.check(documents, results)
    assert count.total == together.block_evaluations
    apart = plan_of(world, documents, memory=world.memory(documents, 2, 2))
    assert apart.chunk < N / 2
    assert apart.block_evaluations >= together.block_evaluations + N // 2
    # Where nothing but outputs is asked for, these are copied from chunk to chunk; and distinct images share nothing.
    alone = {"name": "a", "interventions": [first]}
    assert plan_of(world, [alone]).chunk < N
    world.columns["base"] = TIMM_PLAIN.images(N, 7)
    assert plan_of(world, documents).chunk < N


def test_chunks_become_smaller_where_that_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "WAVES", 1)
    world = World(TIMM_PLAIN, N)
    documents = [{**document, "capture": ["blocks.*.mlp.post"]} for document in EXPERIMENTS["means"]]
    whole = plan_of(world, documents)
    assert whole.chunk == N
    budgets = [int(part * whole.peak_bytes) for part in (0.8, 0.45, 0.2)]
    plans = [plan_of(world, documents, memory=budget) for budget in budgets]
    assert all(plan.peak_bytes <= budget for plan, budget in zip(plans, budgets, strict=True))
    assert ["and held" in str(plan) for plan in plans] == [True, True, False]
    assert [plan.block_evaluations == whole.block_evaluations for plan in plans] == [True, True, False]
    assert [plan.chunk for plan in plans] == sorted((plan.chunk for plan in plans), reverse=True)
    world.check(documents, world.execute(documents, batch_size=2, memory=budgets[1]))


def test_what_is_held_is_within_what_the_plan_says(world: World) -> None:
    documents = EXPERIMENTS["means"]
    plan = plan_of(world, documents)
    with Held() as held:
        world.execute(documents, batch_size=2)
    assert 0.2 * plan.peak_bytes < held.most < plan.peak_bytes + plan.result_bytes + world.columns["base"].nbytes * 2


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_that_goes_on_gives_the_same_bits(
    world: World, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And computes of the images of finished chunks only those that pass together with others."""
    documents = EXPERIMENTS[name]
    n_chunks = -(-N // plan_of(world, documents).chunk)
    original, added = resume.FinishedChunks.add, []

    def stopping(self: Any, chunk: range, *args: Any) -> None:
        if len(added) == n_chunks - 1:
            raise KeyboardInterrupt
        original(self, chunk, *args)
        added.append(chunk)

    with Counted(world.module) as everything:
        whole = world.execute(documents, batch_size=2, out=tmp_path / "whole")
    with Counted(world.module), monkeypatch.context() as patch:
        patch.setattr(resume.FinishedChunks, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            world.execute(documents, batch_size=2, out=tmp_path / "cut")
    with Counted(world.module) as rest:
        results = world.execute(documents, batch_size=2, out=tmp_path / "cut")
    assert_same_bits(results, whole)
    assert 0 < rest.total < 0.6 * everything.total


def test_memory_that_runs_out_before_the_chunks_halves_the_rows(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = clean_forwards._images

    def small(data: Any, batch: Any) -> Any:
        if len(batch.images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(data, batch)

    documents = EXPERIMENTS["means"]
    monkeypatch.setattr(clean_forwards, "_images", small)
    with caplog.at_level(logging.WARNING):
        results = world.execute(documents, batch_size=2)
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory at 2 rows per forward: going on with 1."
    ]
    assert results.provenance["halvings"] == 1
    world.check(documents, results)


def test_images_are_made_ready_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background, in the order in which forwards ask for them."""
    documents = EXPERIMENTS["resampled"]
    world.columns = {**world.columns, "base": list(world.columns["base"]), "source": list(world.columns["source"])}
    plan = plan_of(world, documents)
    assert "and held" in str(plan)
    made: list[int] = []
    original = Data._ready

    def ready(self: Data, column: str, examples: Any) -> Any:
        made.extend(examples)
        return original(self, column, examples)

    monkeypatch.setattr(Data, "_ready", ready)
    world.execute(documents, batch_size=2)
    assert len(made) == sum(forward.images for forward in plan.clean)


def test_what_is_needed_of_images_of_several_chunks_alone_is_known(world: World) -> None:
    """The rest is copied together with what is held, which takes as much again."""
    schedule = world.schedule(EXPERIMENTS["several columns"], 3, 2)
    common, sources = schedule.needs.common, world.columns["source"][: N // 2]
    for need, examples in common.needs.items():
        column = world.columns[origin_of(need).column]
        assert all(any(torch.equal(column[i], other) for other in sources) for i in examples.tolist())
    every = {need for chunk in schedule.chunks for need in schedule.needs.of(chunk)}
    assert every == set(common.needs)
    assert common.entirely == {need for need in every if len(common.needs[need]) == N}
    assert not common.entirely
    everywhere = world.schedule(EXPERIMENTS["means"], 3, 2).needs.common
    bases = {need for need in everywhere.needs if origin_of(need).column == "base"}
    assert everywhere.entirely == bases


def test_examples_without_a_base_share_a_chunk_where_their_sources_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(TIMM_PLAIN, N)
    stream = {"op": "interchange", "site": "blocks.0.resid_post", "source": "source"}
    then = [{"op": "ablate", "site": f"blocks.{n}.mlp_out", "tokens": [n]} for n in (1, 2)]
    documents = [{"name": "a", "interventions": [stream, *then], "capture": ["pooled"]}]
    for equal in (True, False):
        if equal:
            world.columns["source"][N // 2 :] = world.columns["source"][: N // 2]
        else:
            world.columns["source"] = TIMM_PLAIN.images(N, 8)
        assert world.schedule(documents, N, 2).sharing.joins_examples == equal
    nothing = {"op": "ablate", "site": "blocks.0.resid_post"}  # of no image at all
    documents = [{"name": "a", "interventions": [nothing, *then], "capture": ["pooled"]}]
    assert world.schedule(documents, N, 2).sharing.joins_examples
