"""Blocks on their way to the disk, in the host's memory beside its budget until they are written."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.store.disk import DiskTier
from vit_mechinterp.engine.store.keys import Entry
from vit_mechinterp.engine.store.memory import Block, BlockName
from vit_mechinterp.engine.store.writer import Writer

__all__ = ["Outgoing"]

logger = logging.getLogger(__name__)


class Outgoing:
    """What is to be written on one disk, until the disk refuses.

    Args:
        disk: the disk, or None: then nothing is ever written.
        most: bytes of blocks beside the host's budget that have gaps, at most.

    Attributes:
        writes: whether anything is written.
    """

    def __init__(self, disk: DiskTier | None, most: int) -> None:
        self.disk, self.most = disk, most
        self.writes = disk is not None
        self.blocks: dict[BlockName, Block] = {}
        self._writer = Writer()

    def add(self, entry: Entry) -> Entry:
        """Begin to write under a key: whoever comes first decides how large blocks are."""
        try:
            return self.disk.add(entry) if self.disk is not None and self.writes else entry
        except OSError as error:
            self._stop(error)
            return entry

    def _stop(self, error: OSError) -> None:
        if self.writes:
            self.writes = False
            logger.warning(
                "Activations can no longer be written (%s): the store goes on with the files that it has.",
                error,
            )

    def get(self, name: BlockName) -> Block | None:
        """A block that is here."""
        return self.blocks.get(name)

    def make(self, entry: Entry, number: int) -> Block | None:
        """An empty block beside the budget; None if nothing is written."""
        if not self.writes:
            return None
        self._forget_oldest(entry.key.name)
        tensor = torch.empty(entry.block_shape(number), dtype=entry.dtype)
        block = Block(tensor, tensor, np.zeros(len(entry.slots(number)), dtype=np.bool_))
        self.blocks[entry.key.name, number] = block
        return block

    def _forget_oldest(self, key: str) -> None:
        """Of an entry's blocks with gaps, drop the oldest while all of them are many: rows that are read here
        and there would leave one after another that nothing completes."""
        here = list(self.blocks.items())  # the thread that writes takes blocks away meanwhile
        filling = {name: own.tensor.nbytes for name, own in here if not own.complete}
        beside = sum(filling.values())
        for name in [name for name in filling if name[0] == key]:
            if beside > self.most:
                beside -= filling[name]
                del self.blocks[name]

    def save(self, entry: Entry, number: int, block: Block) -> None:
        """Send a complete block to the disk, unless it is there; where nothing can be written, none stays
        beside the budget."""
        there = self.disk is not None and self.disk.has(entry, number)
        if there or not self.writes:
            self.blocks.pop((entry.key.name, number), None)
        else:
            self._writer.submit(block, partial(self._write, entry, number, block.tensor))
        block.saved = there or self.writes

    def _write(self, entry: Entry, number: int, tensor: Tensor) -> None:
        try:
            if self.disk is not None and self.writes:
                self.disk.write(entry, number, tensor)
        except OSError as error:
            self._stop(error)
        finally:
            self.blocks.pop((entry.key.name, number), None)

    def flush(self) -> None:
        """Wait until every complete block is on disk."""
        self._writer.flush()

    def close(self) -> None:
        """Finish writing, and forget the blocks that have gaps."""
        self._writer.close()
        self.blocks.clear()
