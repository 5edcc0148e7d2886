"""Clean values of one image column: read from a store where it has them, computed where it does not.

Every image passes through the model once, and always in the same batch of images, so that a value has the
same bits whether it was stored before, is computed now, or was lost in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read, by_token, contiguous, gather
from vit_mechinterp.engine.store.forward import Rows, Wanted, clean_forward, stop_behind
from vit_mechinterp.engine.store.holdings import Holdings
from vit_mechinterp.engine.store.keys import Entry
from vit_mechinterp.engine.store.reading import read_items
from vit_mechinterp.model.heap import GivingBack

__all__ = ["Source"]

Tick = Callable[[int], object]

_SELECTED_BYTES = 16 * 1024**2
"""Bytes of whole activations that are in memory while a selection of them is made."""


class Source:
    """Values of clean forwards of one image column.

    Args:
        holdings: what is stored of it.
    """

    def __init__(self, holdings: Holdings) -> None:
        self.holdings = holdings
        self.tiers, self.vit, self.data = holdings.tiers, holdings.vit, holdings.data
        self._tick: Tick = _uncounted
        self._give_back = GivingBack(self.tiers.free)
        kind = self.vit.device.type
        # What is computed later, outside of this autocast or within another, is the same all the same.
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._expected: dict[Wanted, NDArray[np.bool_]] = {}

    @contextmanager
    def counting(self, tick: Tick) -> Iterator[None]:
        """Inside the ``with`` block, ``tick`` is called with the number of (row, block) pairs of every
        forward."""
        self._tick = tick
        try:
            yield
        finally:
            self._tick = _uncounted

    def expect(self, wanted: Mapping[Wanted, IntArray], *, keep: bool = True) -> None:
        """Say what will be asked for, of which examples. A forward that is needed for some of it then gives
        and keeps the rest for its images, so that none of them needs another; what is there already stays
        before what is not wanted, unless this is but a forecast (``keep=False``)."""
        self._expected = {read: np.zeros(len(self.holdings.slots(read)), dtype=np.bool_) for read in wanted}
        for read, examples in wanted.items():
            slots = self.holdings.slots(read).of[examples]
            self._expected[read][slots] = True
            if keep and (entry := self.holdings.entry(read)) is not None:
                self.tiers.keep(entry, slots)

    def take(self, wanted: Mapping[Wanted, IntArray]) -> dict[Wanted, Tensor]:
        """Values of some examples each, item by item, on the model's device and in the dtype that is kept."""
        found: dict[Wanted, Tensor] = {}
        missing: dict[Wanted, IntArray] = {}
        for read, examples in wanted.items():
            entry, slots = self.holdings.entry(read), self.holdings.slots(read)
            absent = examples
            if entry is not None:
                own = slots.of[examples]
                found[read] = self._empty(entry, own)
                absent = slots.examples[read_items(self.tiers, entry, own, found[read])]
            if len(absent) and read is not None and (whole := self._from_whole(read, examples)) is not None:
                found[read] = whole
            elif len(absent):
                missing[read] = np.unique(absent)
        for grain, reads in self.holdings.grains(missing):
            values = self.compute(grain, [*reads, *self._beside(reads, grain)])
            for read in reads:
                entry, slots = self.holdings.ensure(read, values[read]), self.holdings.slots(read)
                own = slots.of[wanted[read]]
                if read not in found:
                    found[read] = self._empty(entry, own)
                _copy(entry, slots.of_images(grain), values[read], own, found[read])
        return found

    def _empty(self, entry: Entry, slots: IntArray) -> Tensor:
        shape = int(entry.counts(slots).sum()), *entry.shape
        if self.vit.device.type != "cpu" or 0 in shape:  # no token of these examples is read
            return torch.empty(shape, dtype=entry.dtype, device=self.vit.device)
        # numpy asks for large pages, of which the first touch costs far less.
        pages = np.empty(int(np.prod(shape, dtype=np.int64)) * entry.dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(pages).view(entry.dtype).view(shape)

    def _from_whole(self, read: Read, examples: IntArray) -> Tensor | None:
        """A selection of tokens and heads from whole activations, if those are stored; few of them are in
        memory at once."""
        whole = self.holdings.whole(read)
        entry = self.holdings.entry(whole) if whole != read else None
        if entry is None or len(self.tiers.absent(entry, self.holdings.slots(whole).of[examples])):
            return None
        own = Read(ColumnOrigin(self.holdings.column), read.site, read.positions, read.heads)
        few = max(1, _SELECTED_BYTES // max(1, entry.item_bytes))
        pieces = []
        for start in range(0, len(examples), few):
            part = examples[start : start + few]
            once, which = self.holdings.stored_once(whole, part)
            slots = self.holdings.slots(whole).of[once]
            values = self._empty(entry, slots)
            if len(read_items(self.tiers, entry, slots, values)):
                return None
            rows = contiguous(which)
            selected = which if rows is None else rows
            pieces.append(gather(read.site, by_token(read.site, values), selected, own, part))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def chosen(self, read: Read, places: IntArray, examples: IntArray) -> Iterator[tuple[IntArray, Tensor]]:
        """Tokens that examples choose of whole activations, of which few are in memory at once.

        Args:
            read: the tokens and heads.
            places: the column's example in whose place the image of each example stands.
            examples: the examples.

        Yields:
            Some of the examples, ascending, and what `gather` gives of them.
        """
        whole = self.holdings.whole(read)
        once, which = self.holdings.stored_once(whole, places)
        batches = self.holdings.images[once] // self.holdings.rows
        few = max(1, _SELECTED_BYTES * len(self.holdings.by_image) // self.holdings.nbytes(whole))
        for span in _spans(batches, few):
            values = self.take({whole: once[span]})[whole]
            own = np.flatnonzero((which >= span.start) & (which < span.stop))
            items = by_token(read.site, values)
            yield examples[own], gather(read.site, items, which[own] - span.start, read, examples[own])

    def foresee(self, wanted: Mapping[Wanted, IntArray]) -> Iterator[tuple[tuple[int, ...], int]]:
        """The forwards that `take` would need: examples of their images, and the blocks that these pass
        through. What they would give counts as stored from then on."""
        for grain, reads in self.holdings.grains(self.holdings.absent(wanted)):
            every = [*reads, *self._beside(reads, grain)]
            for read in every:
                self.holdings.imagine(read, grain)
            yield self.holdings.examples(grain), stop_behind(every, self.vit.layout.n_layers).blocks

    def _beside(self, reads: Sequence[Wanted], grain: range) -> Iterator[Wanted]:
        """What else is expected of a batch of images, and not stored."""
        for read, slots in self._expected.items():
            own = self.holdings.slots(read).of_images(grain)
            examples = self.holdings.slots(read).examples[own.start : own.stop][slots[own.start : own.stop]]
            if read not in reads and len(examples) and self.holdings.absent({read: examples}):
                yield read

    def fill(self, wanted: Mapping[Wanted, IntArray] | None = None) -> None:
        """Compute and keep what is wanted (everything by default) and not stored, one batch at a time."""
        for grain, reads in self.holdings.grains(self.holdings.absent(wanted)):
            self.compute(grain, reads)

    def compute(self, grain: range, reads: Sequence[Wanted]) -> dict[Wanted, Tensor]:
        """Values of one batch, by one forward; they are kept.

        Raises:
            OutOfMemoryError: the forward does not fit.
        """
        values = self._forward(grain, reads)
        for read, value in values.items():
            entry, slots = self.holdings.ensure(read, value), self.holdings.slots(read)
            self.tiers.put(entry, slots.of_images(grain), value)
        self._give_back()
        return values

    def _forward(self, batch: range, reads: Sequence[Wanted]) -> dict[Wanted, Tensor]:
        kind, low = self.vit.device.type, self._autocast
        with torch.autocast(kind, dtype=low, enabled=low is not None):
            values, blocks = clean_forward(
                self.vit,
                lambda: self.data.images(self.holdings.column, self.holdings.examples(batch)),
                {read: self._rows(read, batch) for read in reads},
                {layer for read in reads for layer in self.holdings.key(read).explicit},
                self.holdings.dtype,
            )
        self._tick(len(batch) * blocks)
        return values

    def _rows(self, read: Wanted, batch: range) -> Rows:
        """The rows of a batch that the slots of its images are filled from."""
        slots = self.holdings.slots(read)
        own = slots.of_images(batch)
        examples = slots.examples[own.start : own.stop]
        if len(own) == len(batch):
            return Rows(slice(0, len(batch)), examples)
        return Rows(self.holdings.by_image.of[examples] - batch.start, examples)


def _uncounted(n: int) -> None:
    """Forwards that nobody counts."""


def _spans(batches: IntArray, few: int) -> Iterator[slice]:
    """Spans of ascending numbers of batches that are a few long, or as long as one batch; none is cut."""
    begin = 0
    for end in (*(np.flatnonzero(np.diff(batches)) + 1).tolist(), len(batches)):
        if end - begin >= few or end == len(batches):
            yield slice(begin, end)
            begin = end


def _copy(entry: Entry, given: range, value: Tensor, wanted: IntArray, out: Tensor) -> None:
    """Put the items of wanted slots into their places, from those of consecutive slots."""
    inside = (wanted >= given.start) & (wanted < given.stop)
    if not inside.any():
        return
    begin = entry.span(given).start
    places = np.flatnonzero(np.repeat(inside, entry.counts(wanted)))
    items = entry.items(wanted[inside]) - begin
    index = torch.as_tensor(items, device=value.device)
    out[torch.as_tensor(places, device=out.device)] = value[index].to(out.dtype)
