"""The batch at work and the blocks that it fills share a store's budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.stores import N, captured
from tests.engine.world import Counted, World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import ActivationStore
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read
from vit_mechinterp.engine.store.batch import image_bytes
from vit_mechinterp.spec import Site


@pytest.fixture(scope="module")
def world() -> World:
    return World(TIMM_PLAIN, N)


def test_a_batch_takes_at_most_half_of_the_budget_unless_all_of_it_is_stored(world: World, tmp_path: Path) -> None:
    site = "blocks.0.resid_post"
    image = image_bytes(world.vit, [Read(ColumnOrigin("base"), Site.parse(site))], torch.float32)
    assert image > 4 * (4 * 3 * 16 * 16 + 14 * 17 * 24)
    with ActivationStore(tmp_path, host=4 * image) as store:
        assert captured(store, world, site, batch_size=2).rows_per_forward == 2
        assert store.tiers.host.budget == 4 * image - image // 4 - 2 * image
        assert captured(store, world, "embed", batch_size=8).rows_per_forward == 2
        assert captured(store, world, "embed", batch_size="auto").rows_per_forward == 2
    with ActivationStore(tmp_path, host=0) as store:
        assert captured(store, world, site, batch_size=8).rows_per_forward == 8
    with ActivationStore(tmp_path, host=2 * image) as store, Counted(world.module) as counted:
        assert captured(store, world, site, batch_size=8).rows_per_forward == 8
        assert counted.launches == 0
        assert captured(store, world, "blocks.1.resid_post", batch_size=8).rows_per_forward == 1
    with ActivationStore(host=image // 2) as store:  # one image passes, whatever it takes
        assert captured(store, world, site, batch_size=8).rows_per_forward == 1


def test_blocks_leave_room_for_a_batch(world: World) -> None:
    with ActivationStore(host="1MiB") as store:
        captured(store, world, "embed", batch_size=1)
        before = store.usage()["host"]
        assert before > 0
        store.tiers.leave_room(2**20, torch.device("cpu"))
        assert store.tiers.host.budget == 2**20 - 2**16 - 2**19
        store.tiers.host.shrink(before - 1)
        assert store.usage()["host"] < before
