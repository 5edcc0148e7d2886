"""Addressable sequences: element i is the same however the sequence is cut into batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHUNK", "ChunkedGenerator"]

CHUNK = 64
"""Elements that are drawn together from one random stream; a batch of this size, aligned, is generated
without waste.
"""

BatchT = TypeVar("BatchT")


class ChunkedGenerator(ABC, Generic[BatchT]):
    """Makes any range of an endless sequence out of whole chunks, each with its own random stream.

    ``BatchT`` is a frozen dataclass whose array fields have the element as their first axis.
    """

    def __init__(self) -> None:
        self._latest: tuple[int, BatchT] | None = None

    @abstractmethod
    def _chunk(self, index: int) -> BatchT:
        """Make elements ``index * CHUNK .. (index + 1) * CHUNK - 1``."""

    def batch(self, start: int, count: int) -> BatchT:
        """Make elements ``start .. start + count - 1`` of the sequence."""
        parts: list[BatchT] = []
        for index in range(start // CHUNK, -(-(start + count) // CHUNK)):
            if self._latest is None or self._latest[0] != index:
                self._latest = (index, self._chunk(index))
            first = max(start - index * CHUNK, 0)
            parts.append(_sliced(self._latest[1], first, min(start + count - index * CHUNK, CHUNK)))
        batch: BatchT = parts[0] if len(parts) == 1 else _concatenated(parts)
        return batch


def _arrays(batch: Any) -> dict[str, NDArray[Any]]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def _sliced(batch: Any, first: int, last: int) -> Any:
    return replace(batch, **{name: array[first:last] for name, array in _arrays(batch).items()})


def _concatenated(parts: list[Any]) -> Any:
    columns = [_arrays(part) for part in parts]
    return replace(
        parts[0], **{name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    )
