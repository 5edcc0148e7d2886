"""The clean values that chunks read, and how they are come by: each image once in a chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.binding.values import Need, Read, Values
from vit_mechinterp.engine.forwards.clean_forwards import Filling, forwards
from vit_mechinterp.engine.inputs.ahead import Request
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling.footprint import SUMMED
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["Clean", "CleanPass", "PlainClean", "Tick", "means_from"]

Tick = Callable[[int], object]
"""Called with the number of (row, block) pairs of every forward."""


@dataclass
class Clean:
    """What clean forwards gave; outputs are float32."""

    values: dict[Need, Values] = field(default_factory=dict)


class CleanPass(ABC):
    """Makes the clean values of chunks."""

    @abstractmethod
    def __call__(
        self,
        vit: HookedViT,
        data: Data,
        schedule: Schedule,
        chunk: range,
        reads: Sequence[Read] | None = None,
        tick: Tick = lambda n: None,
    ) -> Clean:
        """What one chunk needs; or, with ``reads``, these alone, for all of its examples."""

    @abstractmethod
    def requests(
        self, schedule: Schedule, chunks: Iterable[range], reads: Sequence[Read] | None = None
    ) -> Iterator[Request]:
        """The batches of images that will be asked for, in order."""

    def expect(self, schedule: Schedule, chunks: Iterable[range], *, means: bool) -> None:  # noqa: B027  # most passes need not know
        """Be told which chunks will be asked for, and whether dataset means will be before."""

    def means(
        self, vit: HookedViT, data: Data, schedule: Schedule, tick: Tick = lambda n: None
    ) -> dict[Read, Tensor]:
        """Dataset means by a pass of their own over every chunk; sums are kept in float64."""
        sums: dict[Read, Tensor] = {}
        counts: dict[Read, int] = dict.fromkeys(schedule.reads.means, 0)
        for chunk in schedule.chunks:
            clean = self(vit, data, schedule, chunk, schedule.reads.means, tick)
            for read in schedule.reads.means:
                total, count = _sum(clean.values[read])
                sums[read] = total if read not in sums else sums[read] + total
                counts[read] += count
            del clean  # or it would be held while the next chunk's values are made
        return {read: sums[read] / counts[read] for read in schedule.reads.means}


class PlainClean(CleanPass):
    """Computes what each chunk needs, and keeps nothing for the next."""

    def __call__(
        self,
        vit: HookedViT,
        data: Data,
        schedule: Schedule,
        chunk: range,
        reads: Sequence[Read] | None = None,
        tick: Tick = lambda n: None,
    ) -> Clean:
        """What one chunk needs; or, with ``reads``, these alone, for all of its examples."""
        needs = schedule.own_needs(chunk, reads)
        filling = {need: Filling.of(schedule, need, examples) for need, examples in needs.items()}
        for _ in forwards(vit, data, schedule.clean_batches(needs), filling, tick):
            pass
        return Clean({need: own.values() for need, own in filling.items()})

    def requests(
        self, schedule: Schedule, chunks: Iterable[range], reads: Sequence[Read] | None = None
    ) -> Iterator[Request]:
        """The batches of images that will be asked for, in order."""
        for chunk in chunks:
            for batch in schedule.clean_batches(schedule.own_needs(chunk, reads)):
                yield from batch.by_column()


def means_from(schedule: Schedule, clean: Clean) -> dict[Read, Tensor]:
    """Dataset means from a clean pass over the whole dataset, whose values go if they are for means alone."""
    sums = {read: _sum(clean.values[read]) for read in schedule.reads.means}
    for read in filter(schedule.reads.is_for_means_alone, schedule.reads.means):
        del clean.values[read]
    return {read: total / count for read, (total, count) in sums.items()}


def _sum(values: Values) -> tuple[Tensor, int]:
    """Sum over examples (over selected tokens), and how many there are; a few rows at a time in float64."""
    tensor, starts = values.tensor, values.starts
    held = len(tensor) if starts is None else len(starts) - 1
    counts = np.bincount(values.place, minlength=held)
    counts = counts if starts is None else np.repeat(counts, np.diff(starts))
    times = torch.as_tensor(counts, dtype=torch.float64, device=tensor.device)
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64, device=tensor.device)
    rows = max(1, SUMMED // max(1, 8 * total.numel()))
    for start in range(0, len(tensor), rows):
        span = slice(start, start + rows)
        total += torch.einsum("r,r...->...", times[span], tensor[span].double())
    return total, int(counts.sum())
