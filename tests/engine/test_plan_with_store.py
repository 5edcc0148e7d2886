"""A plan of an experiment with a store counts what the store would compute, and says why some of it twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.experiments import cut_small
from tests.engine.test_store_repeats import DOCUMENTS, MEANS_AND_MORE, RESAMPLED
from tests.engine.world import Counted, World
from tests.tiny_models import N_LAYERS, TIMM_PLAIN
from vit_mechinterp import ActivationStore, Run
from vit_mechinterp.errors import SpecError

N, IMAGES = 20, 7
SWAP: list[dict[str, Any]] = [
    {
        "name": "swap",
        "interventions": [{"op": "interchange", "site": "blocks.1.resid_post", "source": "source", "tokens": [0, 4]}],
    }
]


@pytest.fixture
def world() -> World:
    """Both columns draw from the same few images."""
    world = World(TIMM_PLAIN, N)
    draw = torch.Generator().manual_seed(1)
    images = TIMM_PLAIN.images(IMAGES, seed=5)
    for column in ("base", "source"):
        world.columns[column] = images[torch.randint(0, IMAGES, (N,), generator=draw)]
    world.vit.sites()  # takes a forward, once
    return world


def planned(world: World, documents: list[dict[str, Any]], store: ActivationStore | None) -> vmi.Plan:
    runs = [Run.model_validate(document) for document in documents]
    return vmi.plan(
        world.vit, runs, world.columns, batch_size=3, tensors=world.named(documents), store=store
    )


@pytest.mark.parametrize("chunks", ["one", "many"])
@pytest.mark.parametrize("host", ["1GiB", 0])
@pytest.mark.parametrize("documents", [DOCUMENTS, MEANS_AND_MORE, RESAMPLED, SWAP])
def test_blocks_and_launches_are_those_that_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: str, host: Any, documents: Any
) -> None:
    if chunks == "many":
        cut_small(monkeypatch)
    totals = []
    with ActivationStore(tmp_path if host == 0 else None, host=host) as store:
        for _ in range(2):
            plan = planned(world, documents, store)
            with Counted(world.module) as counted:
                world.execute(documents, batch_size=3, store=store)
            assert (counted.total, counted.launches) == (plan.block_evaluations, plan.launches)
            totals.append(counted.total)
        assert totals[0] > totals[1]
        assert plan.clean == ()
        assert "everything that clean forwards give is stored" in plan.notes
    without = planned(world, documents, None)
    assert totals[1] < without.block_evaluations


def test_it_says_what_is_not_made_later_for_the_stores_sake(world: World) -> None:
    edit = {"op": "interchange", "site": "blocks.1.resid_mid", "source": "source", "tokens": [2]}
    held = {"op": "interchange", "site": "blocks.1.mlp.post", "source": "source", "tokens": [2]}
    documents = [{"name": "swap", "interventions": [edit]}, {"name": "both", "interventions": [edit, held]}]
    with ActivationStore() as store:
        with_store = planned(world, documents, store)
    without = planned(world, documents, None)
    assert (
        "interventions are made where they are declared, though later would be the same, because a store is likelier "
        "to have what they read there: run 'swap', interchange at blocks.1.resid_mid"
    ) in str(with_store)
    assert "though later" not in str(without)
    assert "interventions are made later, where that is the same: run 'swap'" in str(without)
    rows = [sum(own.blocks for own in plan.rows) for plan in (with_store, without)]
    assert rows == [2 * 2, 2 * 1]


def test_it_says_what_a_store_keeps_apart(world: World) -> None:
    world.columns["source"][0] = TIMM_PLAIN.images(1, seed=6)[0]
    world.columns["base"][1] = TIMM_PLAIN.images(1, seed=7)[0]
    both = {image.numpy().tobytes() for image in world.columns["base"]}
    both &= {image.numpy().tobytes() for image in world.columns["source"]}
    with ActivationStore() as store:
        (note,) = planned(world, SWAP, store).notes
    assert 1 < len(both) <= IMAGES
    assert note == (
        f"{len(both)} images pass through the model once for each column that they stand in, because a store computes a "
        "column in batches of its own, unless another one holds all of its images, and all that is read of them"
    )
    assert planned(world, SWAP, None).notes == ()


def test_what_is_stored_of_one_column_is_read_for_both(world: World) -> None:
    images = TIMM_PLAIN.images(IMAGES, seed=5)
    for column, first in (("base", 0), ("source", 1)):  # no row is its own source
        world.columns[column] = images[[(first + n) % IMAGES for n in range(N)]]
    with ActivationStore() as store:
        assert planned(world, SWAP, store).notes == ()
        store.capture(world.vit, world.columns, "blocks.1.resid_post", batch_size=3, progress=False)
        plan = planned(world, SWAP, store)
    assert plan.notes == ("everything that clean forwards give is stored",)
    assert plan.clean == ()


def test_columns_of_the_same_images_are_one(world: World) -> None:
    world.columns["source"] = world.columns["base"].clone()
    documents = [
        {"name": column, "base": column, "interventions": [{"op": "ablate", "site": f"blocks.{n}.attn_out"}]}
        for n, column in enumerate(("base", "source"))
    ]
    documents.append({"name": "mean", "interventions": [{"op": "ablate", "site": "blocks.1.mlp_out", "method": "mean"}]})
    with ActivationStore() as store:
        plan = planned(world, documents, store)
        with Counted(world.module) as counted:
            results = world.execute(documents, batch_size=3, store=store)
        assert (counted.total, counted.launches) == (plan.block_evaluations, plan.launches)
        assert not any("once for each column" in note for note in plan.notes)
        assert [(own.column, own.images) for own in plan.clean] == [("base", IMAGES)]
        world.check(documents, results)


def test_columns_of_the_same_distinct_images_share_what_is_stored(world: World) -> None:
    """Though no example has the same image in both."""
    images = TIMM_PLAIN.images(2, seed=5)
    world.columns["base"], world.columns["source"] = images[[0, 1] * (N // 2)], images[[0, *([1] * (N - 1))]]
    documents = [{"name": column, "base": column} for column in ("base", "source")]
    with ActivationStore() as store:
        plan = planned(world, documents, store)
        with Counted(world.module) as counted:
            world.execute(documents, batch_size=3, store=store)
    assert (counted.total, counted.launches) == (plan.block_evaluations, plan.launches)
    assert counted.total == 2 * N_LAYERS
    assert plan.notes == ()


def test_it_says_that_a_store_is_too_small(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)
    with ActivationStore(host="4KiB") as store:
        notes = planned(world, RESAMPLED, store).notes
    assert any(note.startswith("the store cannot hold what all chunks need until they read it") for note in notes)


def test_a_store_without_data_is_refused(world: World) -> None:
    runs = [Run.model_validate(document) for document in SWAP]
    with ActivationStore() as store, pytest.raises(SpecError, match=r"this plan has no data\. Give plan the data too"):
        vmi.plan(world.vit, runs, store=store)
