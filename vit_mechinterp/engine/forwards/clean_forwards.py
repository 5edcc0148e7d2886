"""Clean forwards: each image no further than anybody reads, keeping only what somebody reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray, within_each
from vit_mechinterp.engine.binding.values import Need, Read, Values, contiguous, gather, origin_of
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling.clean_groups import CleanGroup
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Instrument, StopForward

__all__ = ["Filling", "forwards"]


class Filling:
    """What is needed of some images, which comes in piece by piece.

    Args:
        need: a value, or the output.
        examples: the examples that it is needed of, ascending.
        images: the number of each one's image.
    """

    def __init__(self, need: Need, examples: IntArray, images: IntArray) -> None:
        self.read = need if isinstance(need, Read) else None
        self.examples = examples
        self.tensor: Tensor | None = None
        self.starts: IntArray | None = None
        if self.read is None or self.read.positions.is_all:
            self.images, self.place = np.unique(images, return_inverse=True)
            self.place = self.place.reshape(-1)
            self.size = len(self.images)
            self._examples = examples[np.unique(self.place, return_index=True)[1]]
        else:
            self.images, self.place = images, np.arange(len(images))
            self.starts = np.concatenate([[0], np.cumsum(self.read.positions.counts(examples, 0))])
            self.size = int(self.starts[-1])
            self._examples = examples

    @classmethod
    def of(cls, schedule: Schedule, need: Need, examples: IntArray) -> Filling:
        """What is needed of some examples, of which nothing is there yet."""
        return cls(need, examples, schedule.sharing.images_of(origin_of(need))[examples])

    def members(self, batch: IntArray) -> tuple[IntArray, IntArray]:
        """Which entries come from a batch of images, and from which of its rows."""
        order, images = self._sorted
        first, last = np.searchsorted(images, batch), np.searchsorted(images, batch, side="right")
        counts = last - first
        rows = np.repeat(np.arange(len(batch)), counts)
        entries = order[np.repeat(first, counts) + within_each(counts)]
        ascending = np.argsort(entries)
        return entries[ascending], rows[ascending]

    @cached_property
    def _sorted(self) -> tuple[IntArray, IntArray]:
        """Entries in the order of their images, and these."""
        order = np.argsort(self.images, kind="stable")
        return order, self.images[order]

    def take(self, value: Tensor, entries: IntArray, rows: IntArray) -> None:
        """Keep what a batch holds of the value."""
        span = contiguous(rows)
        if self.read is None:
            piece = value[rows if span is None else span].float()
        else:
            own = self._examples[entries]
            piece = gather(self.read.site, value, rows if span is None else span, self.read, own)
        if self.starts is None:
            places = entries
        else:
            counts = self.starts[entries + 1] - self.starts[entries]
            places = np.repeat(self.starts[entries], counts) + within_each(counts)
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
        assert self.tensor is not None, "no forward has given any of it"
        return Values(self.tensor, self.examples, self.place, self.starts)


def forwards(
    vit: HookedViT,
    data: Data,
    batches: Iterable[CleanGroup],
    filling: Mapping[Need, Filling],
    tick: Callable[[int], object],
) -> Iterator[CleanGroup]:
    """Run clean forwards, one whenever the next is asked for, and keep what they give.

    They run under ``no_grad``, not in inference mode: trainings read the values.

    Args:
        vit: the model.
        data: the examples.
        batches: the images of each forward.
        filling: what is kept.
        tick: called with the number of (row, block) pairs of every forward.
    """
    for batch in batches:
        _forward(vit, data, batch, filling)
        tick(len(batch.images) * batch.stop.blocks)
        yield batch


def _forward(vit: HookedViT, data: Data, batch: CleanGroup, filling: Mapping[Need, Filling]) -> None:
    instrument = Instrument(vit.module, vit.layout)
    members = {need: own.members(batch.images) for need, own in filling.items()}
    members = {need: found for need, found in members.items() if len(found[0])}

    def keep(need: Need) -> Callable[[Tensor], None]:
        return lambda value: filling[need].take(value, *members[need])

    for read in (need for need in members if isinstance(need, Read)):
        instrument.visit(read.site, keep(read))
    stop = batch.stop.at(vit.layout.n_layers)
    if stop is not None:
        instrument.stop(stop[0], before=stop[1])
    with torch.no_grad(), instrument.installed():
        with suppress(StopForward):
            output = vit(_images(data, batch))
            for origin in (need for need in members if not isinstance(need, Read)):
                keep(origin)(output)
        instrument.verify()


def _images(data: Data, batch: CleanGroup) -> Tensor:
    parts = [data.images(column, examples) for column, examples in batch.by_column()]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
