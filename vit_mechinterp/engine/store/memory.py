"""Blocks of activations in a GPU's or the host's memory, under a budget, the least recently used out."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.store.keys import Entry

__all__ = ["Block", "MemoryTier", "Unfinished", "in_pages"]

BlockName = tuple[str, int]
"""Name of an entry, and number of a block of it."""
Unfinished = Literal["none", "own", "any"]
"""Whose unfinished blocks may be dropped for a block: nobody's, those of the same entry, or any."""


def in_pages(nbytes: int) -> int:
    """Bytes of the whole pages that so many take."""
    return -(-nbytes // 4096) * 4096


@dataclass
class Block:
    """One block: its tensor, and which of its slots are there.

    ``busy`` counts those who still read it elsewhere, so that it must stay. Copies to and from a GPU are
    asynchronous; `settle` waits for the last of them. ``saved`` says that it is on disk, or on its way.
    """

    tensor: Tensor
    buffer: Tensor
    have: NDArray[np.bool_]
    busy: int = 0
    saved: bool = False
    copying: list[torch.cuda.Event] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all of its slots are there."""
        return bool(self.have.all())

    def copies(self, stream: torch.cuda.Stream) -> None:
        """Note that copies from or to the block are under way on a stream."""
        event: torch.cuda.Event = stream.record_event()
        under_way = [own for own in self.copying if not own.query()]  # type: ignore[no-untyped-call]
        self.copying = [*under_way, event]

    def wait_on(self, stream: torch.cuda.Stream) -> None:
        """Let what a stream does from then on wait for the copies that are under way."""
        for event in tuple(self.copying):
            stream.wait_event(event)

    def settle(self) -> None:
        """Wait until no copy is under way that was noted before, whoever else waits for it."""
        for event in tuple(self.copying):
            event.synchronize()
            with suppress(ValueError):  # another thread has crossed it out
                self.copying.remove(event)


class MemoryTier:
    """Preallocated blocks of one memory. A block that is dropped leaves its buffer to the next.

    Args:
        budget: most bytes of all buffers together.
        device: where they lie.
        pinned: whether they lie in page-locked memory, which a GPU copies from and to by itself.
    """

    def __init__(self, budget: int, device: torch.device, *, pinned: bool = False) -> None:
        self.budget = budget
        self.device = device
        self.pinned = pinned
        self.used = 0
        self._blocks: OrderedDict[BlockName, Block] = OrderedDict()
        self._free: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, name: BlockName) -> Block | None:
        """A block, which counts as used; None if it is not here."""
        block = self._blocks.get(name)
        if block is not None:
            self._blocks.move_to_end(name)
        return block

    def peek(self, name: BlockName) -> Block | None:
        """The same, which does not count as use."""
        return self._blocks.get(name)

    def has(self, name: BlockName, local: IntArray) -> bool:
        """Whether a block is here with some of its slots; does not count as use."""
        block = self._blocks.get(name)
        return block is not None and bool(block.have[local].all())

    def make(
        self, entry: Entry, number: int, *, evict: bool, unfinished: Unfinished = "none"
    ) -> Block | None:
        """An empty block; None if there is no room for it.

        Args:
            entry: whose block it is.
            number: the block's number.
            evict: whether others may be dropped for it; those that are read elsewhere never are.
            unfinished: whether these may be such as are still filling up: none, the entry's own, or any.
        """
        name, shape, dtype = (entry.key.name, number), entry.block_shape(number), entry.dtype
        self.drop(name)
        size = int(np.prod(shape, dtype=np.int64))
        makes_room = partial(self._evict, entry.key.name, unfinished) if evict else lambda: False
        buffer = self._buffer(max(1, size * dtype.itemsize), makes_room)
        if buffer is None:
            return None
        tensor = buffer[: size * dtype.itemsize].view(dtype).view(shape)
        block = Block(tensor, buffer, np.zeros(len(entry.slots(number)), dtype=np.bool_))
        self._blocks[name] = block
        return block

    def _buffer(self, nbytes: int, makes_room: Callable[[], bool]) -> Tensor | None:
        # Blocks of one kind are equally large, so their buffers fit each other.
        size = in_pages(nbytes)
        if self.pinned:  # torch takes powers of two of it
            size = 1 << (size - 1).bit_length()
        if size > self.budget:
            return None
        while True:
            fitting = [n for n, own in enumerate(self._free) if size <= len(own) <= 2 * size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda n: len(self._free[n])))
            if self.used + size <= self.budget and (buffer := self._allocate(size)) is not None:
                self.used += size
                return buffer
            if self._free:
                self.used -= len(self._free.pop())
            elif not makes_room():
                return None

    def _allocate(self, size: int) -> Tensor | None:
        """New memory; None where there is less than the budget says, so that the tier does with less."""
        try:
            if self.device.type == "cpu" and not self.pinned and hasattr(mmap, "MAP_ANONYMOUS"):
                # Pages of their own, so that the heap stays compact, and that go back once they are free.
                pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                return torch.frombuffer(pages, dtype=torch.uint8)
            return torch.empty(size, dtype=torch.uint8, device=self.device, pin_memory=self.pinned)
        except (OSError, MemoryError, RuntimeError):  # of a GPU, or of memory that cannot be page-locked
            return None

    def shrink(self, budget: int) -> None:
        """Hold no more than so much from then on; whatever is complete and not read elsewhere may leave."""
        self.budget = min(self.budget, budget)
        while self.used > self.budget and (self._free or self._evict("", "none")):
            if self._free:
                self.used -= len(self._free.pop())

    def _evict(self, key: str, unfinished: Unfinished) -> bool:
        """Drop the least recently used block; one that is still filling up, and so nowhere else, if asked."""
        idle = [(name, block.complete) for name, block in self._blocks.items() if not block.busy]
        chosen = [name for name, complete in idle if complete]
        if not chosen and unfinished != "none":
            chosen = [name for name, _ in idle if unfinished == "any" or name[0] == key]
        if chosen:
            self.drop(chosen[0])
        return bool(chosen)

    def drop(self, name: BlockName) -> None:
        """Forget a block; its buffer is free."""
        block = self._blocks.pop(name, None)
        if block is not None:
            block.settle()
            self._free.append(block.buffer)

    def clear(self) -> None:
        """Forget everything, and give the memory back."""
        for name in list(self._blocks):
            self.drop(name)
        self._free.clear()
        self.used = 0
