"""Images made ready in the background: the same bits, in order, a few at a time, and errors where they belong."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.experiments import cut_small
from tests.engine.world import World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp.engine.inputs import ahead
from vit_mechinterp.engine.inputs.ahead import Ahead
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError

N = 17


def pictures(seed: int) -> list[Any]:
    draw = np.random.default_rng(seed)
    return [PIL.Image.fromarray(draw.integers(0, 255, (40, 48, 3), dtype=np.uint8)) for _ in range(N)]


@pytest.fixture(scope="module")
def data() -> Any:
    features = datasets.Features({"base": datasets.Image(), "source": datasets.Image()})
    return datasets.Dataset.from_dict({"base": pictures(0), "source": pictures(1)}, features=features)


RUNS = [
    vmi.Run(name="clean", capture=["pooled"]),
    vmi.Run(name="swap", interventions=[vmi.Interchange(site="blocks.1.resid_post", source="source", tokens="cls")]),
]


@pytest.mark.parametrize("kept", ["none", "folder", "store"])
def test_every_batch_is_made_ahead_and_is_the_same_bits(
    data: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: str
) -> None:
    cut_small(monkeypatch)
    vit = World(TIMM_PLAIN, 1).vit
    made: list[str] = []
    original = Data._batch

    def batch(self: Data, column: str, examples: Sequence[int]) -> torch.Tensor:
        made.append(threading.current_thread().name)
        return original(self, column, examples)

    options: dict[str, Any] = {"batch_size": 2, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(Ahead, "take", lambda self, column, examples: None)
        plain = vmi.execute(vit, RUNS, data, **options)
    monkeypatch.setattr(Data, "_batch", batch)
    options |= {"out": tmp_path} if kept == "folder" else {"store": vmi.ActivationStore()} if kept == "store" else {}
    results = vmi.execute(vit, RUNS, data, **options)
    torch.testing.assert_close(results.logits, plain.logits, atol=1e-5, rtol=0)
    assert kept == "store" or torch.equal(results.logits, plain.logits)
    # One image of every column is looked at beforehand.
    assert made.count("MainThread") == 2
    assert sum(name.startswith("images") for name in made) >= N
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())


def test_few_batches_wait() -> None:
    requests = [("base", (i,)) for i in range(50)]
    made: list[int] = []

    def make(column: str, examples: Sequence[int]) -> torch.Tensor:
        made.append(examples[0])
        return torch.tensor(examples)

    for workers, most, depth in ((1, 10**9, 2), (3, 10**9, 4), (3, 20, 2), (3, 1, 1)):
        made.clear()
        upcoming = Ahead(make, requests, nbytes=10, workers=workers, most=most)
        for i in range(50):
            time.sleep(0.001)
            assert len(made) <= i + depth
            batch = upcoming.take("base", [i])
            assert batch is not None
            assert batch.item() == i
        assert upcoming.take("base", [50]) is None
        upcoming.close()
        assert sorted(made) == list(range(50))


def test_what_is_asked_out_of_order_is_left_to_the_caller() -> None:
    upcoming = Ahead(lambda column, examples: torch.ones(1), [("a", (0,)), ("a", (1,))], nbytes=1, workers=1)
    assert upcoming.take("b", [0]) is None
    assert upcoming.take("a", [0]) is None
    upcoming.close()


def test_an_error_of_an_image_is_the_same(data: Any) -> None:
    vit = World(TIMM_PLAIN, 1).vit
    images: list[Any] = pictures(0)
    images[9] = None
    columns = Data({"base": images}, vit)
    requests = [("base", tuple(range(i, min(N, i + 4)))) for i in range(0, N, 4)]
    with columns.ahead(requests):
        columns.images("base", range(4))
        columns.images("base", range(4, 8))
        with pytest.raises(DataError, match="Column 'base', example 9 is no image of this model: None"):
            columns.images("base", range(8, 12))
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())


def test_one_thread_beside_a_model_on_the_cpu_and_for_objects_that_are_shared() -> None:
    assert ahead.workers_for("cpu", shared=False) == ahead.workers_for("cuda", shared=True) == 1


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (6, 3), (16, 8), (64, 8)])
def test_half_of_the_cores_make_images_for_a_gpu(monkeypatch: pytest.MonkeyPatch, cores: int, workers: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert ahead.workers_for("cuda", shared=False) == workers
    assert ahead.workers_for("cuda", shared=True) == ahead.workers_for("cpu", shared=False) == 1
