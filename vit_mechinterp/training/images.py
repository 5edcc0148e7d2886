"""The images of a training: those of every step, and those of every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from vit_mechinterp.stimuli.batches import TaskBatch, TaskGenerator
from vit_mechinterp.stimuli.discrimination import DiscriminationGenerator
from vit_mechinterp.stimuli.render import NORMALIZATION, Normalization
from vit_mechinterp.stimuli.rmts import RMTSGenerator
from vit_mechinterp.training.config import EvaluationSplit, TrainingConfig

__all__ = ["TrainingImages", "evaluation_count", "evaluation_images"]

_TASKS: dict[str, Callable[..., TaskGenerator[Any]]] = {
    "discrimination": DiscriminationGenerator,
    "rmts": RMTSGenerator,
}


def evaluation_images(
    config: TrainingConfig, split: EvaluationSplit, normalization: Normalization = NORMALIZATION
) -> TaskGenerator[Any]:
    """Return the generator of a split, in the geometry of a training.

    ``train``, ``val``, ``test_iid`` and ``test`` are those of the training's combinations and seed. The
    out-of-distribution objects are shown in the images of a test split.
    """
    beyond = split.startswith("ood-")
    return _TASKS[config.task](
        "test" if beyond else split,
        seed=config.seed,
        canvas=config.canvas,
        patch=config.patch,
        cell=config.cell,
        combinations=split if beyond else config.combinations,
        normalization=normalization,
    )


def evaluation_count(config: TrainingConfig, split: EvaluationSplit, n: int | None = None) -> int:
    """Return how many images of a split are measured: ``n``, by default ``config.test_images``; of a finite
    training set no more than it has, since those behind it were never trained on.
    """
    wanted = config.test_images if n is None else n
    return min(config.train_images or wanted, wanted) if split == "train" else wanted


class TrainingImages(Dataset[list[TaskBatch]]):
    """The images of every step, for one of several processes: a list of ``accumulate`` equal parts.

    Where every image is new, step s shows images ``s * batch_size ...`` of the "train" split. Of a finite
    set, step s shows the next ``batch_size`` of a permutation that the seed and the epoch decide; what is
    left of an epoch is dropped. Either way a step's images depend on the step alone, so a resumed training
    sees what an uninterrupted one would have seen, and the set is the same for any number of processes.

    Args:
        config: the training.
        normalization: how the images are scaled.
        rank, processes: which equal share of a step's images is this process's.
    """

    def __init__(
        self,
        config: TrainingConfig,
        normalization: Normalization = NORMALIZATION,
        *,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.config = config
        self.generator = evaluation_images(config, "train", normalization)
        self.share = config.batch_size // (processes * config.accumulate)
        self.first = rank * self.share * config.accumulate
        n = config.train_images
        self.whole: TaskBatch | None = None if n is None else self.generator.batch(0, n)

    def __getitem__(self, step: int) -> list[TaskBatch]:
        starts = [self.first + part * self.share for part in range(self.config.accumulate)]
        if self.whole is None:
            begin = step * self.config.batch_size
            return [self.generator.batch(begin + start, self.share) for start in starts]
        epoch, place = divmod(step, self.config.epoch_steps)
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.whole.label))
        chosen = order[place * self.config.batch_size :]
        return [_taken(self.whole, chosen[start : start + self.share]) for start in starts]

    def steps(self, first: int) -> Iterator[list[TaskBatch]]:
        """The images of all steps from ``first`` on, made ahead by ``config.workers`` processes."""
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, self.config.steps),
            num_workers=self.config.workers,
            collate_fn=_as_they_are,
            generator=torch.Generator(),  # the global one is left as it is
        )
        return iter(loader)


def _as_they_are(batches: list[TaskBatch]) -> list[TaskBatch]:
    return batches


def _taken(batch: TaskBatch, chosen: NDArray[np.int64]) -> TaskBatch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    arrays: dict[str, Any] = {
        name: value[chosen] for name, value in values.items() if isinstance(value, np.ndarray)
    }
    return replace(batch, **arrays)
