"""Where blocks of activations are, in a GPU's memory, the host's, or on disk, and how they fill up."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.scheduling.budget import FREED, WAITING
from vit_mechinterp.engine.store.disk import DiskTier
from vit_mechinterp.engine.store.keys import Entry, Key
from vit_mechinterp.engine.store.memory import Block, BlockName, MemoryTier, Unfinished
from vit_mechinterp.engine.store.outgoing import Outgoing

__all__ = ["Tiers"]

_BESIDE = 32 * 1024**2
"""Bytes of blocks with gaps on their way to the disk where the host has no budget to hold them."""


class Tiers:
    """The three tiers of a store, inclusive: a block in a faster one may be in the slower ones as well.

    Args:
        folder: folder of the disk tier, or None.
        gpu: bytes on every GPU that is used.
        host: bytes in the host's memory.
        disk: bytes in the folder.
    """

    def __init__(self, folder: Path | None, gpu: int, host: int, disk: int) -> None:
        self.gpu_budget, self.host_budget = gpu, host
        self.gpus: dict[torch.device, MemoryTier] = {}
        waiting = host // WAITING
        self.host = MemoryTier(host - waiting, torch.device("cpu"))
        self.disk = None if folder is None or disk == 0 else DiskTier(folder, disk)
        self.outgoing = Outgoing(self.disk, _BESIDE)
        self.lock = threading.RLock()
        self._entries: dict[Key, Entry] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def gpu(self, device: torch.device) -> MemoryTier | None:
        """The tier of a GPU's memory; None for the host, or where it is left out."""
        if device.type != "cuda":
            return None
        self.host.pinned = True  # from the first GPU on, which copies from and to such memory by itself
        if self.gpu_budget == 0:
            return None
        if device not in self.gpus:
            self.gpus[device] = MemoryTier(self.gpu_budget, device)
        return self.gpus[device]

    @property
    def waiting(self) -> int | None:
        """Bytes of images that wait for the model at most; None where the host has no budget."""
        return self.host_budget // WAITING or None

    @property
    def free(self) -> int:
        """Bytes of memory that may have been freed and not been returned."""
        return (self.host_budget or _BESIDE) // FREED

    def most_at_work(self, image: int, device: torch.device) -> int:
        """Images of so many bytes that half of the budget of a device's memory has room for, one at least; a
        tier that is left out sets no limit."""
        budget = self.budget_on(device)
        return max(1, budget // 2 // image) if budget else sys.maxsize

    def leave_room(self, nbytes: int, device: torch.device) -> None:
        """Hold so much less in a device's memory from then on, at most half of its budget, for the images
        that pass through the model: the least recently used blocks leave."""
        with self.lock:
            tier = self.gpu(device) if device.type == "cuda" else self.host
            if tier is not None:
                waiting = 0 if device.type == "cuda" else self.host_budget // WAITING
                budget = self.budget_on(device)
                tier.shrink(budget - waiting - min(nbytes, budget // 2))

    def budget_on(self, device: torch.device) -> int:
        """Bytes that were given for a device's memory; 0 where the tier is left out."""
        return self.gpu_budget if device.type == "cuda" else self.host_budget

    def known(self, key: Key, starts: IntArray | None) -> Entry | None:
        """What was ever stored under a key; None if nothing."""
        with self.lock:
            if key not in self._entries and self.disk is not None:
                entry = self.disk.entry(key, starts)
                if entry is not None:
                    self._entries[key] = entry
            return self._entries.get(key)

    @property
    def filling(self) -> int:
        """Bytes that blocks of all values which fill up together should take at most."""
        return self.host.budget // 4 or _BESIDE

    def holds(self, nbytes: int, device: torch.device, *, in_order: bool) -> bool:
        """Whether so much stays until it is read: in a memory, or, if it comes in the order in which blocks
        fill up, on disk, where only whole blocks go."""
        gpu = self.gpu(device)
        memory = max(self.host.budget, 0 if gpu is None else gpu.budget)
        disk = self.disk.budget if self.disk is not None and self.outgoing.writes and in_order else 0
        return nbytes <= max(memory, disk)

    def rows_of(self, key: Key) -> set[int]:
        """Numbers of images per forward under which the same is stored."""
        with self.lock:
            own = {known.rows for known in self._entries if known.family == key.family}
            return own.union(() if self.disk is None else self.disk.rows_of(key))

    def add(self, entry: Entry) -> Entry:
        """Begin to store under a key; on disk, whoever comes first decides how large blocks are."""
        with self.lock:
            if entry.key not in self._entries:
                self._entries[entry.key] = self.outgoing.add(entry)
            return self._entries[entry.key]

    def put(self, entry: Entry, slots: range, values: Tensor) -> None:
        """Keep the items of consecutive slots, ``[item, *shape]``, on whatever device they are."""
        with self.lock:
            begin = entry.span(slots).start
            for number in range(slots.start // entry.block, (slots.stop - 1) // entry.block + 1):
                own = entry.slots(number)
                part = range(max(own.start, slots.start), min(own.stop, slots.stop))
                span = entry.span(part)
                self._put(entry, number, part, values[span.start - begin : span.stop - begin])

    def _put(self, entry: Entry, number: int, part: range, piece: Tensor) -> None:
        name = entry.key.name, number
        gpu = self.gpu(piece.device)
        if gpu is not None:
            alone = not self.outgoing.writes and self.host.budget == 0
            unfinished: Unfinished = "any" if alone else "none"
            block = gpu.get(name) or gpu.make(entry, number, evict=alone, unfinished=unfinished)
            if block is not None:
                self._fill(block, entry, number, part, piece)
        block = self.host.get(name) or self.outgoing.get(name) or self._assemble(entry, number)
        if block is None:
            return
        self._fill(block, entry, number, part, piece)
        if block.complete and not block.saved:
            self.outgoing.save(entry, number, block)

    def _assemble(self, entry: Entry, number: int) -> Block | None:
        """A block that fills up: within the host's budget, or, on its way to the disk, beside it where that
        cannot hold one block of every entry."""
        block = self.host.make(entry, number, evict=True)
        if block is None:
            self.flush()  # what waits to be written cannot be driven out
            # Entries that drove out each other's blocks would never complete one.
            unfinished: Unfinished = "own" if self.outgoing.writes else "any"
            block = self.host.make(entry, number, evict=True, unfinished=unfinished)
        return self.outgoing.make(entry, number) if block is None else block

    def _fill(self, block: Block, entry: Entry, number: int, part: range, piece: Tensor) -> None:
        own = entry.slots(number)
        first, span = entry.span(own).start, entry.span(part)
        target = block.tensor[span.start - first : span.stop - first]
        if piece.is_cuda and not target.is_cuda:
            if piece.device not in self._streams:
                self._streams[piece.device] = torch.cuda.Stream(piece.device)  # type: ignore[no-untyped-call]
            stream = self._streams[piece.device]
            piece = piece.to(target.dtype).contiguous()
            stream.wait_stream(torch.cuda.current_stream(piece.device))
            with torch.cuda.stream(stream):
                target.copy_(piece, non_blocking=True)
            piece.record_stream(stream)
            block.copies(stream)
        else:
            target.copy_(piece)
            if target.is_cuda:
                block.copies(torch.cuda.current_stream(target.device))
        block.have[part.start - own.start : part.stop - own.start] = True

    def flush(self) -> None:
        """Wait until every complete block is on disk."""
        self.outgoing.flush()

    def absent(self, entry: Entry, slots: IntArray) -> IntArray:
        """Those of some slots that no tier has, as far as can be said without reading."""
        with self.lock:
            numbers = slots // entry.block
            there = np.zeros(len(slots), dtype=np.bool_)
            for number in np.unique(numbers).tolist():
                here = numbers == number
                there[here] = self._held(entry, number, slots[here])
            return slots[~there]

    def keep(self, entry: Entry, slots: IntArray) -> None:
        """Count blocks of some slots as used, so that what is not wanted leaves before them."""
        with self.lock:
            for number in np.unique(slots // entry.block).tolist():
                for tier in (*self.gpus.values(), self.host):
                    tier.get((entry.key.name, number))

    def _held(self, entry: Entry, number: int, slots: IntArray) -> NDArray[np.bool_]:
        """Which of some slots of one block are somewhere."""
        name, local = (entry.key.name, number), slots - number * entry.block
        held = np.zeros(len(local), dtype=np.bool_)
        for block in self.in_memory(name):
            held |= block.have[local]
        if not held.all() and self.disk is not None and self.disk.has(entry, number):
            held[:] = True
        return held

    def in_memory(self, name: BlockName) -> list[Block]:
        """A block wherever it is but on disk, which does not count as use."""
        found = [tier.peek(name) for tier in (*self.gpus.values(), self.host)]
        return [block for block in (*found, self.outgoing.get(name)) if block is not None]

    def usage(self) -> dict[str, int]:
        """Bytes held by tier."""
        gpus = sum(tier.used for tier in self.gpus.values())
        return {"gpu": gpus, "host": self.host.used, "disk": self.disk.usage() if self.disk else 0}

    def close(self) -> None:
        """Finish writing, and give all memory back."""
        self.outgoing.close()
        with self.lock:
            for tier in (self.host, *self.gpus.values()):
                tier.clear()
            if self.disk is not None:
                self.disk.close()

    def forget(self) -> None:
        """Remove every file. How large blocks are stays decided: whoever still reads goes by it."""
        if self.disk is not None:
            self.disk.clear()
