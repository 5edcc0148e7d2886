"""What a store holds of one image column: where its values stand, under which keys, and what is absent.

Every image has one place, however many examples hold it: distinct images stand in the order in which they
first appear, and forwards begin at multiples of ``rows`` of them, whoever asks for which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling.footprint import read_size
from vit_mechinterp.engine.store.forward import Wanted
from vit_mechinterp.engine.store.keys import Entry, Key, positions_digest
from vit_mechinterp.engine.store.slots import Slots, slots_of
from vit_mechinterp.engine.store.tiers import Tiers
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site

__all__ = ["Holdings"]

_BLOCK_BYTES, _LEAST_BLOCK_BYTES = 16 * 1024**2, 256 * 1024
"""Most and least bytes of a block of stored values."""


class Holdings:
    """Values of clean forwards of one image column in a store.

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

    Attributes:
        by_image: where values stand that are the same for all examples of an image.
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
    ) -> None:
        self.tiers = tiers
        self.vit = vit
        self.data = data
        self.column = column
        self.reads = tuple(dict.fromkeys(reads))
        self.rows = rows
        self.dtype = vit.dtype if dtype is None else dtype
        self._model = vit.fingerprint() if model is None else model
        self._precision = vit.precision
        self._explicit = tuple(
            sorted(
                {
                    read.site.layer
                    for read in self.reads
                    if read is not None and read.site.is_attention_matrix and read.site.layer is not None
                }
            )
        )
        self.by_image, self._by_example = slots_of(images)
        self._repeats = self.by_image is not self._by_example
        self._keys: dict[Wanted, Key] = {}
        self._entries: dict[Wanted, Entry] = {}
        self._imagined: dict[Key, NDArray[np.bool_]] = {}

    @property
    def images(self) -> IntArray:
        """The distinct image of every example, by number in the order in which they first appear."""
        return self.by_image.of

    def slots(self, read: Wanted) -> Slots:
        """Where the values of a column's examples stand."""
        each = read is not None and read.positions.each is not None
        return self._by_example if each else self.by_image

    def nbytes(self, read: Wanted) -> int:
        """Bytes of a value of all examples at most, whether it was ever stored or not."""
        if read is None:
            return 4 * len(self.by_image) * math.prod(self.vit.output_shape())
        return len(self.slots(read)) * read_size(self.vit, read) * self.dtype.itemsize

    def stored_once(self, read: Wanted, examples: IntArray) -> tuple[IntArray, IntArray]:
        """Of some examples one for each slot, in the order of slots, and which of these stands for each."""
        if not self._repeats:
            return examples, np.arange(len(examples))
        _, first, which = np.unique(self.slots(read).of[examples], return_index=True, return_inverse=True)
        return examples[first], which.reshape(-1)

    def key(self, read: Wanted) -> Key:
        """What a value is known by."""
        if read not in self._keys:
            explicit = [n for n in self._explicit if read is None or Site(n, "attn.scores") <= read.site]
            self._keys[read] = Key(
                model=self._model,
                images=self.data.image_digest(self.column, self._representatives),
                site="output" if read is None else str(read.site),
                tokens="all" if read is None else positions_digest(read.positions, self.slots(read)),
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
        return self.by_image.examples.tolist() if self._repeats else None

    def use_rows(self, rows: int) -> None:
        """Change the number of images per forward: what is stored under another is something else."""
        self.rows = rows
        self._keys.clear()
        self._entries.clear()

    def adopt_rows(self, most: int) -> None:
        """Take the number of images per forward under which most of the values are stored already."""
        reads = dict.fromkeys(own for read in self.reads for own in (read, self.whole(read)))
        stored = [rows for read in reads for rows in self.tiers.rows_of(self.key(read))]
        found = [rows for rows in stored if rows <= most]
        if found:
            self.use_rows(max(set(found), key=lambda rows: (found.count(rows), rows == self.rows, rows)))

    def whole(self, read: Wanted) -> Wanted:
        """The whole activation that a value is a part of."""
        return None if read is None else Read(ColumnOrigin(self.column), read.site)

    def entry(self, read: Wanted) -> Entry | None:
        """What is stored of a value; None if its shape is unknown, because nothing ever was."""
        if read not in self._entries:
            key, starts = self.key(read), self._starts(read)
            known = self.tiers.known(key, starts)
            if known is None or known.n != len(self.slots(read)):
                return None
            self._entries[read] = known
        return self._entries[read]

    def _starts(self, read: Wanted) -> IntArray | None:
        if read is None or read.positions.is_all:
            return None
        counts = read.positions.counts(self.slots(read).examples, 0)
        return np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])

    def ensure(self, read: Wanted, value: Tensor) -> Entry:
        """The entry of a value, made with the shape of its items if there was none."""
        found = self.entry(read)
        if found is None:
            starts, shape = self._starts(read), tuple(value.shape[1:])
            draft = Entry(self.key(read), len(self.slots(read)), shape, 1, starts)
            share = self.tiers.filling // len(self.reads)
            wanted = max(min(_LEAST_BLOCK_BYTES, 2 * share), min(_BLOCK_BYTES, share))
            block = max(1, min(draft.n, wanted * draft.n // max(1, draft.nbytes)))
            found = self._entries[read] = self.tiers.add(Entry(draft.key, draft.n, shape, block, starts))
        return found

    def absent(self, wanted: Mapping[Wanted, IntArray] | None = None) -> dict[Wanted, IntArray]:
        """Examples that are not stored, by value, of those that are wanted (of all by default)."""
        everyone = np.arange(self.data.n)
        found: dict[Wanted, IntArray] = {}
        for read, examples in (wanted or dict.fromkeys(self.reads, everyone)).items():
            for own in dict.fromkeys((read, self.whole(read))):
                entry, slots = self.entry(own), self.slots(own).of
                if self._imagined and (foreseen := self._imagined.get(self.key(own))) is not None:
                    examples = examples[~foreseen[slots[examples]]]
                if entry is not None:
                    gone = self.tiers.absent(entry, slots[examples])
                    examples = examples[np.isin(slots[examples], gone)]
            if len(examples):
                found[read] = examples
        return found

    @contextmanager
    def imagining(self, foreseen: dict[Key, NDArray[np.bool_]]) -> Iterator[None]:
        """Inside the ``with`` block, slots of values that ``foreseen`` names count as stored, because
        forwards are foreseen that give them; several columns may imagine together."""
        self._imagined = foreseen
        try:
            yield
        finally:
            self._imagined = {}

    def imagine(self, read: Wanted, grain: range) -> None:
        """Count a value of a batch of images as stored, because a forward is foreseen that gives it."""
        slots = self.slots(read)
        imagined = self._imagined.setdefault(self.key(read), np.zeros(len(slots), dtype=np.bool_))
        own = slots.of_images(grain)
        imagined[own.start : own.stop] = True

    def grains(self, missing: Mapping[Wanted, IntArray]) -> Iterator[tuple[range, list[Wanted]]]:
        """Batches of distinct images that missing examples hold, in order, and what is missing of them."""
        image = self.by_image.of
        grains = {read: np.unique(image[examples] // self.rows) for read, examples in missing.items()}
        for number in sorted({int(n) for own in grains.values() for n in own}):
            batch = range(number * self.rows, min(len(self.by_image), (number + 1) * self.rows))
            yield batch, [read for read, own in grains.items() if number in own]

    def missing_batches(self, wanted: Mapping[Wanted, IntArray] | None = None) -> Iterator[tuple[int, ...]]:
        """Examples of the batches of images of which something that is wanted (everything by default) is not
        stored, in order."""
        return (self.examples(grain) for grain, _ in self.grains(self.absent(wanted)))

    def examples(self, grain: range) -> tuple[int, ...]:
        """An example of every image of a batch."""
        return tuple(self.by_image.examples[grain.start : grain.stop].tolist())
