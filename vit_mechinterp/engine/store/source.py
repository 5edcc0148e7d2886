"""Activations of one image column: read from a store where it has them, computed where it does not.

Every image passes through the model once, however many examples hold it. Distinct images, in the order in
which they first appear, make batches that begin at multiples of ``rows``, whoever asks for which of them, so
that a value has the same bits whether it was stored before, is computed now, or was lost in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read, by_token, contiguous, gather
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling.footprint import read_size
from vit_mechinterp.engine.store.forward import Rows, Wanted, clean_forward, stop_behind
from vit_mechinterp.engine.store.keys import Entry, Key, positions_digest
from vit_mechinterp.engine.store.slots import Slots, slots_of
from vit_mechinterp.engine.store.tiers import Tiers
from vit_mechinterp.model.heap import give_back
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site

__all__ = ["Source", "Wanted", "rows_by_default"]

Tick = Callable[[int], object]

_BLOCK_BYTES = 16 * 1024**2
_LEAST_BLOCK_BYTES = 256 * 1024


def rows_by_default(vit: HookedViT) -> int:
    """Images per forward: the same on every machine of one kind, so that what one stores another finds."""
    if vit.layout.family.one_image is not None:
        return 1
    pixels = torch.Size(vit.layout.tokens.input_shape).numel()
    per_image = max(vit.layout.tokens.n_tokens * vit.layout.d_model, pixels)
    return max(1, (2**24 if vit.device.type == "cuda" else 2**20) // per_image)


class Source:
    """Values of clean forwards of one image column.

    Args:
        tiers: where they are kept.
        vit: the model.
        data: the examples.
        column: the image column.
        images: numbers of its images, ``[example]``; equal numbers, equal images.
        reads: every value that may be asked for; blocks whose attention matrices are among them compute
            their attention explicitly, also where the matrices themselves are stored already.
        rows: images per forward.
        dtype: dtype that values are kept in; the model's by default.
        model: the model's fingerprint, if it is known.
        tick: called with the number of (row, block) pairs of every forward.

    Attributes:
        imagined: which slots of a value count as stored, because forwards are foreseen that give them.
    """

    def __init__(
        self,
        tiers: Tiers,
        vit: HookedViT,
        data: Data,
        column: str,
        images: IntArray,
        reads: Iterable[Wanted],
        rows: int,
        dtype: torch.dtype | None = None,
        model: str | None = None,
        tick: Tick = lambda n: None,
    ) -> None:
        self.tiers = tiers
        self.vit = vit
        self.data = data
        self.column = column
        self.reads = tuple(dict.fromkeys(reads))
        self.rows = rows
        self.dtype = vit.dtype if dtype is None else dtype
        self.tick = tick
        self._model = vit.fingerprint() if model is None else model
        self._precision = vit.precision
        kind = vit.device.type
        # What is computed later, outside of this autocast or within another, is the same all the same.
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._explicit = tuple(
            sorted(
                {
                    read.site.layer
                    for read in self.reads
                    if read is not None and read.site.is_attention_matrix and read.site.layer is not None
                }
            )
        )
        self._by_image, self._by_example = slots_of(images)
        self._repeats = self._by_image is not self._by_example
        self._keys: dict[Wanted, Key] = {}
        self._entries: dict[Wanted, Entry] = {}
        self._expected: dict[Wanted, NDArray[np.bool_]] = {}
        self.imagined: dict[Key, NDArray[np.bool_]] = {}

    @property
    def images(self) -> IntArray:
        """The distinct image of every example, by number in the order in which they first appear."""
        return self._by_image.of

    def nbytes(self, read: Wanted) -> int:
        """Bytes of a value of all examples at most, whether it was ever stored or not."""
        if read is None:
            return 4 * len(self._by_image) * math.prod(self.vit.output_shape())
        return len(self._slots(read)) * read_size(self.vit, read) * self.dtype.itemsize

    def expect(self, wanted: Mapping[Wanted, IntArray]) -> None:
        """Say what will be asked for, of which examples. A forward that is needed for some of it then gives
        and keeps the rest for its images, so that none of them needs another; what is there already stays
        before what is not wanted."""
        self._expected = {read: np.zeros(len(self._slots(read)), dtype=np.bool_) for read in wanted}
        for read, examples in wanted.items():
            slots = self._slots(read).of[examples]
            self._expected[read][slots] = True
            if (entry := self.entry(read)) is not None:
                self.tiers.keep(entry, slots)

    def _slots(self, read: Wanted) -> Slots:
        """Where the values of a column's examples stand."""
        each = read is not None and read.positions.each is not None
        return self._by_example if each else self._by_image

    def stored_once(self, read: Wanted, examples: IntArray) -> tuple[IntArray, IntArray]:
        """Of some examples one for each slot, in the order of slots, and which of these stands for each."""
        if not self._repeats:
            return examples, np.arange(len(examples))
        _, first, which = np.unique(self._slots(read).of[examples], return_index=True, return_inverse=True)
        return examples[first], which.reshape(-1)

    def key(self, read: Wanted) -> Key:
        """What a value is known by."""
        if read not in self._keys:
            explicit = [n for n in self._explicit if read is None or Site(n, "attn.scores") <= read.site]
            self._keys[read] = Key(
                model=self._model,
                images=self.data.image_digest(self.column, self._representatives),
                site="output" if read is None else str(read.site),
                tokens="all" if read is None else positions_digest(read.positions, self._slots(read)),
                heads=None if read is None else read.heads,
                dtype=str(torch.float32 if read is None else self.dtype).removeprefix("torch."),
                precision=self._precision,
                device=self.vit.device.type,
                explicit=tuple(explicit),
                rows=self.rows,
            )
        return self._keys[read]

    @property
    def _representatives(self) -> list[int] | None:
        """An example of every distinct image; None if no image is repeated."""
        return self._by_image.examples.tolist() if self._repeats else None

    def use_rows(self, rows: int) -> None:
        """Change the number of images per forward: what is stored under another is something else."""
        self.rows = rows
        self._keys.clear()
        self._entries.clear()

    def adopt_rows(self, most: int) -> None:
        """Take the number of images per forward under which most of the values are stored already."""
        reads = dict.fromkeys(own for read in self.reads for own in (read, self._whole(read)))
        stored = [rows for read in reads for rows in self.tiers.rows_of(self.key(read))]
        found = [rows for rows in stored if rows <= most]
        if found:
            self.use_rows(max(set(found), key=lambda rows: (found.count(rows), rows == self.rows, rows)))

    def entry(self, read: Wanted) -> Entry | None:
        """What is stored of a value; None if its shape is unknown, because nothing ever was."""
        if read not in self._entries:
            key, starts = self.key(read), self._starts(read)
            known = self.tiers.known(key, starts)
            if known is None or known.n != len(self._slots(read)):
                return None
            self._entries[read] = known
        return self._entries[read]

    def _starts(self, read: Wanted) -> IntArray | None:
        if read is None or read.positions.is_all:
            return None
        counts = read.positions.counts(self._slots(read).examples, 0)
        return np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])

    def ensure(self, read: Wanted, value: Tensor) -> Entry:
        """The entry of a value, made with the shape of its items if there was none."""
        found = self.entry(read)
        if found is None:
            starts, shape = self._starts(read), tuple(value.shape[1:])
            draft = Entry(self.key(read), len(self._slots(read)), shape, 1, starts)
            share = self.tiers.filling // len(self.reads)
            wanted = max(_LEAST_BLOCK_BYTES, min(_BLOCK_BYTES, share))
            block = max(1, min(draft.n, wanted * draft.n // max(1, draft.nbytes)))
            found = self._entries[read] = self.tiers.add(Entry(draft.key, draft.n, shape, block, starts))
        return found

    def take(self, wanted: Mapping[Wanted, IntArray]) -> dict[Wanted, Tensor]:
        """Values of some examples each, item by item, on the model's device and in the dtype that is kept."""
        found: dict[Wanted, Tensor] = {}
        missing: dict[Wanted, IntArray] = {}
        for read, examples in wanted.items():
            entry, slots = self.entry(read), self._slots(read)
            absent = examples
            if entry is not None:
                own = slots.of[examples]
                found[read] = self._empty(entry, own)
                absent = slots.examples[self.tiers.read(entry, own, found[read])]
            if len(absent) and read is not None and (whole := self._from_whole(read, examples)) is not None:
                found[read] = whole
            elif len(absent):
                missing[read] = np.unique(absent)
        for grain, reads in self._grains(missing):
            values = self.compute(grain, [*reads, *self._beside(reads, grain)])
            for read in reads:
                entry, value, slots = self.ensure(read, values[read]), values[read], self._slots(read)
                own = slots.of[wanted[read]]
                if read not in found:
                    found[read] = self._empty(entry, own)
                _copy(entry, slots.of_images(grain), value, own, found[read])
        return found

    def _empty(self, entry: Entry, slots: IntArray) -> Tensor:
        shape = int(entry.counts(slots).sum()), *entry.shape
        if self.vit.device.type != "cpu" or 0 in shape:  # no token of these examples is read
            return torch.empty(shape, dtype=entry.dtype, device=self.vit.device)
        # numpy asks for large pages, of which the first touch costs far less.
        pages = np.empty(int(np.prod(shape, dtype=np.int64)) * entry.dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(pages).view(entry.dtype).view(shape)

    def _whole(self, read: Wanted) -> Wanted:
        """The whole activation that a value is a part of."""
        return None if read is None else Read(ColumnOrigin(self.column), read.site)

    def _from_whole(self, read: Read, examples: IntArray) -> Tensor | None:
        """A selection of tokens and heads from whole activations, if those are stored; few of them are in
        memory at once."""
        whole = self._whole(read)
        entry = self.entry(whole) if whole != read else None
        if entry is None or len(self.tiers.absent(entry, self._slots(whole).of[examples])):
            return None
        own = Read(ColumnOrigin(self.column), read.site, read.positions, read.heads)
        few = max(1, _BLOCK_BYTES // max(1, entry.item_bytes))
        pieces = []
        for start in range(0, len(examples), few):
            part = examples[start : start + few]
            once, which = self.stored_once(whole, part)
            slots = self._slots(whole).of[once]
            values = self._empty(entry, slots)
            if len(self.tiers.read(entry, slots, values)):
                return None
            rows = contiguous(which)
            selected = which if rows is None else rows
            pieces.append(gather(read.site, by_token(read.site, values), selected, own, part))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def absent(self, wanted: Mapping[Wanted, IntArray] | None = None) -> dict[Wanted, IntArray]:
        """Examples that are not stored, by value, of those that are wanted (of all by default)."""
        everyone = np.arange(self.data.n)
        found: dict[Wanted, IntArray] = {}
        for read, examples in (wanted or dict.fromkeys(self.reads, everyone)).items():
            for own in dict.fromkeys((read, self._whole(read))):
                entry, slots = self.entry(own), self._slots(own).of
                if self.imagined and (foreseen := self.imagined.get(self.key(own))) is not None:
                    examples = examples[~foreseen[slots[examples]]]
                if entry is not None:
                    gone = self.tiers.absent(entry, slots[examples])
                    examples = examples[np.isin(slots[examples], gone)]
            if len(examples):
                found[read] = examples
        return found

    def foresee(self, wanted: Mapping[Wanted, IntArray]) -> Iterator[tuple[tuple[int, ...], int]]:
        """The forwards that `take` would need: examples of their images, and the blocks that these pass
        through. What they would give is ``imagined`` from then on, and counts as stored."""
        for grain, reads in self._grains(self.absent(wanted)):
            every = [*reads, *self._beside(reads, grain)]
            for read in every:
                slots = self._slots(read)
                imagined = self.imagined.setdefault(self.key(read), np.zeros(len(slots), dtype=np.bool_))
                own = slots.of_images(grain)
                imagined[own.start : own.stop] = True
            yield self._examples(grain), stop_behind(every, self.vit.layout.n_layers).blocks

    def _grains(self, missing: Mapping[Wanted, IntArray]) -> Iterator[tuple[range, list[Wanted]]]:
        """Batches of distinct images that missing examples hold, in order, and what is missing of them."""
        image = self._by_image.of
        grains = {read: np.unique(image[examples] // self.rows) for read, examples in missing.items()}
        for number in sorted({int(n) for own in grains.values() for n in own}):
            batch = range(number * self.rows, min(len(self._by_image), (number + 1) * self.rows))
            yield batch, [read for read, own in grains.items() if number in own]

    def _beside(self, reads: Sequence[Wanted], grain: range) -> Iterator[Wanted]:
        """What else is expected of a batch of images, and not stored."""
        for read, slots in self._expected.items():
            own = self._slots(read).of_images(grain)
            examples = self._slots(read).examples[own.start : own.stop][slots[own.start : own.stop]]
            if read not in reads and len(examples) and self.absent({read: examples}):
                yield read

    def missing_batches(self, wanted: Mapping[Wanted, IntArray] | None = None) -> Iterator[tuple[int, ...]]:
        """Examples of the batches of images of which something that is wanted (everything by default) is not
        stored, in order."""
        return (self._examples(grain) for grain, _ in self._grains(self.absent(wanted)))

    def _examples(self, grain: range) -> tuple[int, ...]:
        """An example of every image of a batch."""
        return tuple(self._by_image.examples[grain.start : grain.stop].tolist())

    def fill(self) -> None:
        """Compute and keep everything that is not stored, one batch at a time."""
        for grain, reads in self._grains(self.absent()):
            self.compute(grain, reads)

    def compute(self, grain: range, reads: Sequence[Wanted]) -> dict[Wanted, Tensor]:
        """Values of one batch, by one forward; they are kept.

        Raises:
            OutOfMemoryError: the forward does not fit.
        """
        values = self._forward(grain, reads)
        for read, value in values.items():
            self.tiers.put(self.ensure(read, value), self._slots(read).of_images(grain), value)
        give_back()
        return values

    def _forward(self, batch: range, reads: Sequence[Wanted]) -> dict[Wanted, Tensor]:
        kind, low = self.vit.device.type, self._autocast
        with torch.autocast(kind, dtype=low, enabled=low is not None):
            values, blocks = clean_forward(
                self.vit,
                lambda: self.data.images(self.column, self._examples(batch)),
                {read: self._rows(read, batch) for read in reads},
                {layer for read in reads for layer in self.key(read).explicit},
                self.dtype,
            )
        self.tick(len(batch) * blocks)
        return values

    def _rows(self, read: Wanted, batch: range) -> Rows:
        """The rows of a batch that the slots of its images are filled from."""
        slots = self._slots(read)
        own = slots.of_images(batch)
        examples = slots.examples[own.start : own.stop]
        if len(own) == len(batch):
            return Rows(slice(0, len(batch)), examples)
        return Rows(self._by_image.of[examples] - batch.start, examples)


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
