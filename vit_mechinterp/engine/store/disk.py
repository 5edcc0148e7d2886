"""Blocks of activations on disk: one safetensors file each, mapped, with a checksum for every slot."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.files.sealed import open_document, seal_document
from vit_mechinterp.engine.files.tensorfiles import (
    checksum,
    first_come,
    read_tensors,
    replacing,
    sweep,
    writing,
)
from vit_mechinterp.engine.store.keys import Entry, Key

__all__ = ["DiskTier"]

logger = logging.getLogger(__name__)

_MOST_OPEN = 256
"""Mapped files at most."""
_AT_ONCE = 32
"""One part of the budget in so many is made room for at once."""
_USED_SECONDS = 10.0
"""How far the time of last use, as every process sees it, may lag behind."""


@dataclass
class Shard:
    """One block's file, mapped: bytes are read when they are looked at.

    ``stamp`` tells the file from another, or a changed one, of its name; ``checked`` says which slots have
    been compared with their checksums since it was mapped, ``used`` when others were told that it is in use.
    """

    path: Path
    stamp: tuple[int, int, int]
    values: Tensor
    sums: IntArray
    checked: NDArray[np.bool_]
    used: float = -math.inf


class DiskTier:
    """A folder of blocks under a budget, the least recently used out; several processes may share it.

    A block's file is written once and complete, and what its name stands for never changes, so it does not
    matter who writes it, and a file that another process removes is a file that is not there.

    Args:
        folder: the folder; made if need be.
        budget: most bytes of all files together.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder = folder
        self.budget = budget
        self.dropped = 0
        self._total, self._unseen = 0, math.inf
        self._unreadable: set[Path] = set()
        self._open: OrderedDict[Path, Shard] = OrderedDict()
        self._paths: dict[tuple[str, int], Path] = {}
        self._guard = threading.RLock()  # the thread that writes makes room while others read
        folder.mkdir(parents=True, exist_ok=True)
        for own in [folder, *self._entries()]:
            sweep(own)

    def _entries(self) -> list[Path]:
        return [own for own in self.folder.glob("*/*") if own.is_dir()]

    def _home(self, key: Key) -> Path:
        return self.folder / key.family / str(key.rows)

    def path(self, entry: Entry, block: int) -> Path:
        """The file of a block."""
        name = entry.key.name, block
        if name not in self._paths:
            self._paths[name] = self._home(entry.key) / f"{block:06d}.safetensors"
        return self._paths[name]

    def rows_of(self, key: Key) -> list[int]:
        """Numbers of images per forward under which the same is stored."""
        with suppress(OSError):
            homes = [own for own in (self.folder / key.family).iterdir() if own.name.isdigit()]
            return sorted(int(own.name) for own in homes if (own / "entry.json").exists())
        return []

    def entry(self, key: Key, starts: IntArray | None) -> Entry | None:
        """What is stored under a key; None if nothing is, or nothing readable."""
        with suppress(OSError):
            return self._entry(key, starts)
        return None

    def _entry(self, key: Key, starts: IntArray | None) -> Entry | None:
        """The same; an OSError where it cannot be read."""
        try:
            document = open_document((self._home(key) / "entry.json").read_bytes())
        except FileNotFoundError:
            return None
        if document is None:
            return None
        entry = Entry(key, document["n"], tuple(document["shape"]), document["block"], starts)
        return entry if starts is None or len(starts) == entry.n + 1 else None

    def add(self, entry: Entry) -> Entry:
        """Say what is to be stored under a key; whoever comes first decides how large its blocks are.

        Raises:
            OSError: it cannot be written, or what is there cannot be read.
        """
        home = self._home(entry.key)
        home.mkdir(parents=True, exist_ok=True)
        path = home / "entry.json"
        known = self._entry(entry.key, entry.starts)
        if known is not None:
            return known
        document = {"n": entry.n, "shape": entry.shape, "block": entry.block, "key": asdict(entry.key)}
        contents = seal_document(document)
        if not first_come(path, contents) and self._entry(entry.key, entry.starts) is None:
            with replacing(path) as file:  # what is there is damaged
                file.write(contents)
        return self._entry(entry.key, entry.starts) or entry

    def has(self, entry: Entry, block: int) -> bool:
        """Whether there is a file for a block, sound or not."""
        return self.path(entry, block).exists()

    def write(self, entry: Entry, block: int, tensor: Tensor) -> None:
        """Write a complete block, and remove the least recently used ones beyond the budget.

        Raises:
            OSError: it cannot be written.
        """
        first = entry.span(entry.slots(block)).start
        sums = [
            checksum(tensor[span.start - first : span.stop - first])
            for i in entry.slots(block)
            if (span := entry.span(range(i, i + 1)))
        ]
        path = self.path(entry, block)
        layout = {
            "values": (entry.dtype, tuple(tensor.shape)),
            "checksums": (torch.int64, (len(sums),)),
        }
        nbytes = tensor.nbytes + 8 * len(sums) + 512
        if nbytes > self.budget:
            return
        self._make_room(nbytes)
        with writing(path, layout, {"slots": _said(entry, block)}) as writer:
            writer.write("values", tensor)
            writer.write("checksums", torch.tensor(sums, dtype=torch.int64))

    def usage(self) -> int:
        """Bytes of all files, those of other processes included."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[float, int, Path]]:
        found = []
        for home in self._entries():
            with suppress(OSError), os.scandir(home) as files:
                for file in files:
                    with suppress(OSError):
                        if file.name.endswith(".safetensors"):
                            own = file.stat()
                            used = max(own.st_atime, own.st_mtime)
                            found.append((used, own.st_size, Path(file.path)))
        return found

    def _make_room(self, nbytes: int) -> None:
        """Remove what was used least recently, if the budget would not hold so much more. The folder is gone
        through again long before what was free then has been written: others write there, too."""
        self._unseen += nbytes
        free, at_once = self.budget - self._total, self.budget // _AT_ONCE
        if self._unseen <= min(free, max(free, at_once) // 8):
            return
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        if total + nbytes > self.budget:
            # A little more than is needed, so that a full folder is not gone through for every block.
            most = self.budget - nbytes - at_once
            while files and total > most:
                _, size, path = files.pop(0)
                self._forget(path)
                path.unlink(missing_ok=True)
                self.dropped += 1
                total -= size
        self._total, self._unseen = total, nbytes

    def open(self, entry: Entry, block: int) -> Shard | None:
        """A block's file; None if there is none, or none that is sound as far as its header says."""
        path = self.path(entry, block)
        with self._guard:
            try:
                stamp = _stamp(path)
            except OSError:
                self._forget(path)
                return None
            shard = self._open.get(path)
            if shard is None or shard.stamp != stamp:
                shard = self._map(path, stamp, entry, block)
                if shard is None:
                    return None
                self._open[path] = shard
                while len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)
            if time.monotonic() - shard.used > _USED_SECONDS:
                shard.used = time.monotonic()
                with suppress(OSError):
                    # The time of access alone: to other processes the file is the same as before.
                    os.utime(path, ns=(time.time_ns(), stamp[2]))
            self._open.move_to_end(path)
            return shard

    def _forget(self, path: Path) -> None:
        with self._guard:
            self._open.pop(path, None)

    def _map(self, path: Path, stamp: tuple[int, int, int], entry: Entry, block: int) -> Shard | None:
        from safetensors import SafetensorError

        try:
            tensors, metadata = read_tensors(path)
            values, sums = tensors["values"], tensors["checksums"]
            slots = metadata["slots"]
            fits = (tuple(values.shape), values.dtype) == (entry.block_shape(block), entry.dtype)
            if fits and len(sums) == len(entry.slots(block)) and slots == _said(entry, block):
                return Shard(path, stamp, values, sums.numpy(), np.zeros(len(sums), dtype=np.bool_))
            reason = f"it holds {values.dtype} of shape {tuple(values.shape)} of slots {slots}"
        except FileNotFoundError:
            return None
        except OSError as error:
            self._leave(path, error)
            return None
        except (SafetensorError, LookupError, ValueError) as error:
            reason = str(error)
        self.discard(path, reason)
        return None

    def sound(self, shard: Shard, entry: Entry, block: int, slots: IntArray) -> bool:
        """Whether some slots of a file are what was written, each compared once while the file stays as it
        is; a damaged file is dropped with a warning."""
        first_slot = entry.slots(block).start
        first = entry.span(entry.slots(block)).start
        for i in slots[~shard.checked[slots - first_slot]].tolist():
            span = entry.span(range(i, i + 1))
            found = checksum(shard.values[span.start - first : span.stop - first])
            if found != shard.sums[i - first_slot]:
                self.discard(shard.path, f"the checksum of slot {i} differs")
                return False
            shard.checked[i - first_slot] = True
        return True

    def _leave(self, path: Path, error: OSError) -> None:
        """Say once that a file cannot be read; it may be sound, and stays."""
        if path not in self._unreadable:
            self._unreadable.add(path)
            logger.warning(
                "Stored activations %s cannot be read (%s): left as they are, and computed again.",
                path,
                error,
            )

    def discard(self, path: Path, reason: str) -> None:
        """Remove a damaged file, and say so."""
        logger.warning("Stored activations %s are damaged (%s): dropped, and computed again.", path, reason)
        self._forget(path)
        with suppress(OSError):  # of a folder that may only be read
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Hold no file open; those that are asked for are opened again."""
        with self._guard:
            self._open.clear()

    def clear(self) -> None:
        """Remove every file."""
        self.close()
        for _, _, path in self._files():
            path.unlink(missing_ok=True)


def _said(entry: Entry, block: int) -> str:
    """What a file says of the slots that it holds: blocks of other sizes, and of other entries, have the same
    names."""
    slots = entry.slots(block)
    return f"{slots.start} to {slots.stop - 1} of {entry.key.name}"


def _stamp(path: Path) -> tuple[int, int, int]:
    file = path.stat()
    return file.st_ino, file.st_size, file.st_mtime_ns
