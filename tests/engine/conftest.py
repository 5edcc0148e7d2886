"""The experiment of `experiments` on a tiny model, cut into four chunks of two examples."""

from __future__ import annotations

import pytest

from tests.engine.experiments import DOCUMENTS, N, cut_small
from tests.engine.world import World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import Results


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)


@pytest.fixture(scope="module")
def world() -> World:
    return World(TIMM_PLAIN, N)


@pytest.fixture
def whole(world: World, small_chunks: None) -> Results:
    results = world.execute(DOCUMENTS, batch_size=2)
    assert results.provenance["chunk"] == 2
    return results
