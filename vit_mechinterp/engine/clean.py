"""Clean forwards: each image once, no further than anybody reads, keeping only what somebody reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.pieces import CleanGroup
from vit_mechinterp.engine.positions import IntArray
from vit_mechinterp.engine.schedule import Schedule
from vit_mechinterp.engine.values import ColumnOrigin, Read, Values, contiguous, gather
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Instrument, StopForward
from vit_mechinterp.spec import Site

__all__ = ["Clean", "CleanPass", "clean_pass", "dataset_means", "means_of"]


class CleanPass(Protocol):
    """Makes the clean values of one chunk, as `clean_pass` does."""

    def __call__(
        self,
        vit: HookedViT,
        data: Data,
        schedule: Schedule,
        chunk: range,
        reads: Sequence[Read] | None = None,
        tick: Callable[[int], None] = lambda n: None,
    ) -> Clean: ...


@dataclass
class Clean:
    """What the clean forwards of one chunk gave: values by read, outputs (float32) by what they are
    made from."""

    values: dict[Read, Values] = field(default_factory=dict)
    outputs: dict[ColumnOrigin, Values] = field(default_factory=dict)


class _Filling:
    """Values of one read (of the output, if None) that come in piece by piece."""

    def __init__(self, read: Read | None, examples: IntArray, images: IntArray) -> None:
        self.read = read
        self.examples = examples
        self.tensor: Tensor | None = None
        self.starts: IntArray | None = None
        if read is None or read.positions.is_all:
            self.images, self.place = np.unique(images, return_inverse=True)
            self.place = self.place.reshape(-1)
            self.size = len(self.images)
            self._examples = examples[np.unique(self.place, return_index=True)[1]]
        else:
            self.images, self.place = images, np.arange(len(images))
            self.starts = np.concatenate([[0], np.cumsum(read.positions.counts(examples, 0))])
            self.size = int(self.starts[-1])
            self._examples = examples

    def members(self, batch: IntArray) -> tuple[IntArray, IntArray]:
        """Which entries come from a batch of images, and from which of its rows."""
        order = np.argsort(batch)
        found = np.minimum(np.searchsorted(batch[order], self.images), len(batch) - 1)
        rows = order[found]
        entries = np.flatnonzero(batch[rows] == self.images)
        return entries, rows[entries]

    def take(self, site: Site | None, value: Tensor, entries: IntArray, rows: IntArray) -> None:
        """Keep what a batch holds of the value."""
        span = contiguous(rows)
        if self.read is None or site is None:
            piece = value[rows if span is None else span].float()
        else:
            piece = gather(site, value, rows if span is None else span, self.read, self._examples[entries])
        if self.starts is None:
            places = entries
        else:
            counts = self.starts[entries + 1] - self.starts[entries]
            places = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            places = places + np.repeat(self.starts[entries], counts)
        if self.tensor is None:
            # What is all there already is kept as it is, unless it would keep more alive than itself.
            alone = len(places) == self.size and piece.untyped_storage().nbytes() <= piece.nbytes
            if alone and contiguous(places) is not None:
                self.tensor = piece
                return
            self.tensor = piece.new_empty(self.size, *piece.shape[1:])
        target = contiguous(places)
        if target is not None:
            self.tensor[target] = piece
        else:
            self.tensor[torch.as_tensor(places, device=piece.device)] = piece

    def values(self) -> Values:
        """All of it."""
        assert self.tensor is not None
        return Values(self.tensor, self.examples, self.place, self.starts)


def clean_pass(
    vit: HookedViT,
    data: Data,
    schedule: Schedule,
    chunk: range,
    reads: Sequence[Read] | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> Clean:
    """Run the clean forwards of one chunk under ``no_grad``, not inference mode: trainings read the values.

    Args:
        reads: only these reads, for every example (and no outputs); what the chunk needs by default.
        tick: called with the number of (row, block) pairs of every forward.
    """
    needs, outputs = schedule.clean_needs(chunk, reads)
    images_of = schedule.sharing.images_of
    filling: dict[Read, _Filling] = {}
    for read, examples in needs.items():
        assert isinstance(read.origin, ColumnOrigin)
        filling[read] = _Filling(read, examples, images_of(read.origin)[examples])
    results = {
        origin: _Filling(None, examples, images_of(origin)[examples]) for origin, examples in outputs.items()
    }
    for batch in schedule.clean_batches(needs, outputs):
        _forward(vit, data, batch, filling, results)
        tick(len(batch.images) * batch.stop.blocks)
    return Clean(
        {read: own.values() for read, own in filling.items()},
        {origin: own.values() for origin, own in results.items()},
    )


def _forward(
    vit: HookedViT,
    data: Data,
    batch: CleanGroup,
    filling: Mapping[Read, _Filling],
    results: Mapping[ColumnOrigin, _Filling],
) -> None:
    instrument = Instrument(vit.module, vit.layout)

    def keep(own: _Filling, site: Site, entries: IntArray, rows: IntArray) -> Callable[[Tensor], None]:
        return lambda value: own.take(site, value, entries, rows)

    for read, own in filling.items():
        entries, rows = own.members(batch.images)
        if len(entries):
            instrument.visit(read.site, keep(own, read.site, entries, rows))
    stop = batch.stop.at(vit.layout.n_layers)
    if stop is not None:
        instrument.stop(stop[0], before=stop[1])
    with torch.no_grad(), instrument.installed():
        with suppress(StopForward):
            output = vit(_images(data, batch))
            for own in results.values():
                entries, rows = own.members(batch.images)
                if len(entries):
                    own.take(None, output, entries, rows)
        instrument.verify()


def _images(data: Data, batch: CleanGroup) -> Tensor:
    parts = [data.images(column, examples) for column, examples in batch.by_column()]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def means_of(schedule: Schedule, clean: Clean) -> dict[Read, Tensor]:
    """Dataset means from a clean pass over the whole dataset."""
    sums = {read: _sum(clean.values[read]) for read in schedule.mean_reads}
    return {read: total / count for read, (total, count) in sums.items()}


def dataset_means(
    vit: HookedViT,
    data: Data,
    schedule: Schedule,
    tick: Callable[[int], None] = lambda n: None,
    passing: CleanPass = clean_pass,
) -> dict[Read, Tensor]:
    """Dataset means by a pass of their own over every chunk; sums are kept in float64."""
    sums: dict[Read, Tensor] = {}
    counts: dict[Read, int] = dict.fromkeys(schedule.mean_reads, 0)
    for chunk in schedule.chunks:
        clean = passing(vit, data, schedule, chunk, schedule.mean_reads, tick)
        for read in schedule.mean_reads:
            total, count = _sum(clean.values[read])
            sums[read] = total if read not in sums else sums[read] + total
            counts[read] += count
    return {read: sums[read] / counts[read] for read in schedule.mean_reads}


def _sum(values: Values) -> tuple[Tensor, int]:
    """Sum over examples (over selected tokens), and how many there are."""
    tensor, starts = values.tensor.double(), values.starts
    held = len(tensor) if starts is None else len(starts) - 1
    counts = np.bincount(values.place, minlength=held)
    counts = counts if starts is None else np.repeat(counts, np.diff(starts))
    times = torch.as_tensor(counts, device=tensor.device)
    return (tensor * times.view(-1, *[1] * (tensor.ndim - 1))).sum(dim=0), int(times.sum())
