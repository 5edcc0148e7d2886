"""Which images are one and the same: a number per image, equal where the contents are equal.

Tensors are told apart by a sample of their numbers, and by all of them where two samples agree; PIL images by
their pixels; images of a dataset by their encoded files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.inputs.entries import bytes_of
from vit_mechinterp.engine.inputs.stored import stored_bytes

__all__ = ["image_numbers"]

_SAMPLE = 128
"""Numbers of a tensor that are looked at first."""


def image_numbers(data: Data, columns: Sequence[str], *, progress: bool = False) -> dict[str, IntArray]:
    """Numbers of the images of some columns, ``[example]`` each; equal numbers mean equal contents.

    Args:
        data: the examples.
        columns: image columns; a number means the same image in all of them.
        progress: show a bar for a column that takes longer than two seconds.
    """
    distinct: dict[int, str] = {}
    for column in columns:
        whole = data.column(column)
        distinct.setdefault(id(column if whole is None else whole), column)
    marks: dict[str, list[bytes]] = {}
    for column in distinct.values():
        shown = tqdm(
            _marks(data, column), f"comparing {column}", total=data.n, delay=2.0, disable=not progress
        )
        marks[column] = list(shown)
    _look_closer(data, marks)
    seen: dict[bytes, int] = {}
    numbers = {
        column: np.array([seen.setdefault(mark, len(seen)) for mark in own], dtype=np.int64)
        for column, own in marks.items()
    }
    for column in columns:
        whole = data.column(column)
        numbers[column] = numbers[distinct[id(column if whole is None else whole)]]
    return numbers


def _marks(data: Data, column: str) -> Iterator[bytes]:
    """What each image of a column is told apart by at first; marks of samples begin with a zero byte."""
    whole, encoded = data.column(column), data.encoded(column)
    if isinstance(whole, Tensor) and whole.ndim > 1:
        kind = f"{tuple(whole.shape[1:])}{whole.dtype}".encode()
        for row in _sample(whole.reshape(len(whole), -1)):
            yield b"\0" + blake2b(kind + row.tobytes(), digest_size=16).digest()
        return
    if encoded is not None:
        mode = str(encoded.features[column].mode).encode()
        for example in range(data.n):
            file = stored_bytes(encoded[example][column])
            if file is None:
                yield _digest(next(data.values(column, [example])))
            else:
                yield b"\1" + blake2b(mode + file, digest_size=16).digest()
        return
    for entry in data.values(column):
        if isinstance(entry, Tensor):
            sample = _sample(entry.reshape(1, -1))
            kind = f"{tuple(entry.shape)}{entry.dtype}".encode()
            yield b"\0" + blake2b(kind + sample.tobytes(), digest_size=16).digest()
        else:
            yield _digest(entry)


def _sample(rows: Tensor) -> Any:
    """Some numbers of every row, bit by bit."""
    stride = max(1, rows.shape[1] // _SAMPLE)
    return rows.detach()[:, ::stride].cpu().contiguous().view(torch.uint8).numpy()


def _digest(entry: Any) -> bytes:
    return b"\2" + blake2b(bytes_of(entry), digest_size=16).digest()


def _look_closer(data: Data, marks: dict[str, list[bytes]]) -> None:
    """Replace samples that agree by digests of the whole."""
    found: defaultdict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for column, own in marks.items():
        for example, mark in enumerate(own):
            if mark[0] == 0:
                found[mark].append((column, example))
    for places in found.values():
        if len(places) > 1:
            for column, example in places:
                marks[column][example] = _digest(next(data.values(column, [example])))
