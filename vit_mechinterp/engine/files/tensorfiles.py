"""Safetensors files written piece by piece and all at once or not at all, and read through memory maps.

A file appears under its name when it is complete and on the disk; until then it has a name of its own, so
that processes that write into one folder never see, or spoil, each other's unfinished work.
"""

from __future__ import annotations

import errno
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor

__all__ = [
    "Layout",
    "TensorWriter",
    "checksum",
    "file_checksum",
    "first_come",
    "read_tensors",
    "replacing",
    "sweep",
    "writing",
]

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape of every tensor of a file."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_STALE_SECONDS = 3600.0
"""Age at which an unfinished file counts as left over by a process that was killed."""


def _raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; of a contiguous tensor on the CPU without a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def checksum(tensor: Tensor) -> int:
    """XXH3 of a tensor's bytes as a signed 64-bit integer."""
    return int.from_bytes(xxhash.xxh3_64_digest(_raw_bytes(tensor)), "big", signed=True)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that takes its name, maybe from another, only once it is complete and on the disk."""
    own = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with own.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        own.replace(path)
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)
    _sync_folder(path.parent)


def first_come(path: Path, contents: bytes) -> bool:
    """Write a file, complete and on the disk, unless there is one; whether it is ours that is there.

    Raises:
        OSError: it cannot be written.
    """
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with replacing(own) as file:
        file.write(contents)
    try:
        os.link(own, path)
    except OSError:
        if path.exists():
            return False
        own.replace(path)  # this file system has no links
    finally:
        own.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return True


def _sync_folder(folder: Path) -> None:
    """Put a new name on the disk too, where folders can be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove unfinished files that nobody has written to for an hour."""
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


class TensorWriter:
    """Fills the tensors of one file, in any order, each as a whole or piece by piece."""

    def __init__(self, file: IO[bytes], offsets: Mapping[str, int]) -> None:
        self._file = file
        self._offsets = offsets

    def write(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Put a tensor, or the piece of it that begins at element ``first`` (row-major), into its place."""
        self._file.seek(self._offsets[name] + first * tensor.dtype.itemsize)
        self._file.write(_raw_bytes(tensor))


@contextmanager
def writing(path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> Iterator[TensorWriter]:
    """Write a safetensors file whose tensors need not be in memory together."""
    # The widest first, so that every tensor is aligned.
    order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    end = 0
    for name in order:
        dtype, shape = layout[name]
        begins[name], end = end, end + _size(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    offsets = {name: first + begin for name, begin in begins.items()}
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(first + end)
        yield TensorWriter(file, offsets)


def file_checksum(path: Path) -> str:
    """XXH3-128 of a file's contents."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a file, mapped: bytes are read when they are looked at. And the file's metadata.

    Raises:
        FileNotFoundError: it is missing.
        SafetensorError: it is damaged, or no safetensors file.
        OSError: it cannot be opened or mapped, whatever it holds.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (RuntimeError, FileNotFoundError) as error:
        # The file is opened twice, for its header and to be mapped: another process may remove it in between.
        # And where too many files are open, safetensors takes it for missing.
        if path.exists():
            raise OSError(f"{path} cannot be opened: {error}") from error
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
