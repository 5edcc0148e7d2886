"""Arrays of numbers of examples, images and rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["NONE", "BoolArray", "IntArray"]

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
NONE: IntArray = np.zeros(0, dtype=np.int64)
"""No examples, or none of anything else that is numbered."""
