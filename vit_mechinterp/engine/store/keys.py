"""What stored activations are known by: everything that decides their bits, as one digest."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vit_mechinterp.engine.arrays import IntArray, within_each
from vit_mechinterp.engine.binding.positions import Positions
from vit_mechinterp.engine.store.slots import Slots
from vit_mechinterp.spec.digest import digest

__all__ = ["Entry", "Key", "positions_digest"]


@dataclass(frozen=True)
class Key:
    """The identity of one site's activations on one column of images.

    A column that repeats images is known by its distinct ones, in the order in which they first appear, so
    whatever columns have these share what is stored of them.

    Args:
        model: the model's fingerprint.
        images: digest of the distinct images and of their preprocessing.
        site: canonical name of the site, or ``output``.
        tokens: digest of the token positions.
        heads: the heads selected.
        dtype: dtype of what is stored.
        precision: what it was computed in (see `HookedViT.precision`).
        device: type of the device that computed it.
        explicit: blocks whose attention was computed explicitly in the same forwards.
        rows: images per forward; forwards begin at its multiples.
    """

    model: str
    images: str
    site: str
    tokens: str
    heads: tuple[int, ...] | None
    dtype: str
    precision: str
    device: str
    explicit: tuple[int, ...]
    rows: int

    @cached_property
    def name(self) -> str:
        """A digest of all of it, and a name for files."""
        return digest(asdict(self))[:40]

    @cached_property
    def family(self) -> str:
        """The same for every number of images per forward."""
        return replace(self, rows=0).name


def positions_digest(positions: Positions, slots: Slots) -> str:
    """A digest of token positions, and of how many choices of them are made of every image; ``all`` for whole
    activations."""
    if positions.is_all:
        return "all"
    if positions.shared is not None:
        return ",".join(map(str, positions.shared))
    each: object = positions.each
    if positions.each is not None and slots.n_images < len(slots):
        each = [positions.each[example] for example in slots.examples.tolist()], slots.begins.tolist()
    return hashlib.sha256(repr(each).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """Activations of all slots under one key, in blocks of consecutive slots.

    A slot belongs to an image, or to an example (see `Slots`). What is stored of it is one *item* of
    ``shape``, or, where examples differ in their number of tokens, as many items as ``starts`` says.

    Args:
        key: the key.
        n: number of slots.
        shape: shape of an item.
        block: slots per block.
        starts: where the items of each slot begin, ``[n + 1]``; None for one item per slot.
    """

    key: Key
    n: int
    shape: tuple[int, ...]
    block: int
    starts: IntArray | None = None

    @cached_property
    def dtype(self) -> torch.dtype:
        """dtype of the items."""
        found: Any = getattr(torch, self.key.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @cached_property
    def item_bytes(self) -> int:
        """Bytes of an item."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return (self.n if self.starts is None else int(self.starts[-1])) * self.item_bytes

    def slots(self, block: int) -> range:
        """The slots of a block."""
        return range(block * self.block, min(self.n, (block + 1) * self.block))

    def span(self, slots: range) -> slice:
        """The items of consecutive slots."""
        if self.starts is None:
            return slice(slots.start, slots.stop)
        return slice(int(self.starts[slots.start]), int(self.starts[slots.stop]))

    def block_shape(self, block: int) -> tuple[int, ...]:
        """Shape of a block's tensor."""
        span = self.span(self.slots(block))
        return (span.stop - span.start, *self.shape)

    def items(self, slots: IntArray) -> IntArray:
        """The items of some slots, in order."""
        if self.starts is None:
            return slots
        counts = self.starts[slots + 1] - self.starts[slots]
        items: IntArray = np.repeat(self.starts[slots], counts) + within_each(counts)
        return items

    def counts(self, slots: IntArray) -> IntArray:
        """Number of items of some slots."""
        if self.starts is None:
            return np.ones(len(slots), dtype=np.int64)
        counts: IntArray = self.starts[slots + 1] - self.starts[slots]
        return counts
