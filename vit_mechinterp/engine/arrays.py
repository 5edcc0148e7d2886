"""Arrays of numbers of examples, images and rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["NONE", "BoolArray", "IntArray", "within_each"]

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
NONE: IntArray = np.zeros(0, dtype=np.int64)
"""No examples, or none of anything else that is numbered."""


def within_each(counts: IntArray) -> IntArray:
    """Numbers from 0 within each of several stretches of so many, one stretch behind the other: 2, 3 gives
    0, 1, 0, 1, 2."""
    begins = np.cumsum(counts) - counts
    within: IntArray = np.arange(int(np.sum(counts))) - np.repeat(begins, counts)
    return within
