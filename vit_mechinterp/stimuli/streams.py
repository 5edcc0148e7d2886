"""Random streams that are the same in every process, and independent of one another.

A stream is addressed by a seed and a path such as ``("discrimination", "train", 17, "pixels")``. Everything
is derived from the raw bits of the counter-based Philox generator by integer arithmetic and table look-up, so
the numbers do not depend on the platform's mathematics library, on the order in which streams are used, or on
the process that uses them.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.errors import SpecError

__all__ = ["Stream"]

_LEVELS = 1 << 16


@lru_cache(maxsize=4)
def _normal_table(sd: float) -> NDArray[np.int16]:
    """The 65,536 equally likely quantiles of a normal distribution of standard deviation ``sd``, rounded to
    integers.
    """
    normal = NormalDist(0.0, sd)
    return np.array(
        [round(normal.inv_cdf((level + 0.5) / _LEVELS)) for level in range(_LEVELS)], dtype=np.int16
    )


class Stream:
    """One stream of random numbers, addressed by a seed and a path of words and integers.

    Args:
        seed: a non-negative integer.
        path: words and non-negative integers that tell this stream from every other one of the same seed.

    Raises:
        SpecError: the seed is negative.
    """

    def __init__(self, seed: int, *path: str | int) -> None:
        if seed < 0:
            raise SpecError(f"seed={seed}: a seed is a whole number, 0 or more.")
        key = tuple(part if isinstance(part, int) else zlib.crc32(part.encode()) for part in path)
        self._bits = np.random.Philox(np.random.SeedSequence(entropy=seed, spawn_key=key))

    def _raw(self, count: int) -> NDArray[np.uint64]:
        return np.asarray(self._bits.random_raw(count), dtype="<u8")

    def below(self, limit: int | NDArray[Any], *shape: int) -> NDArray[np.int64]:
        """Draw integers uniformly from ``0 .. limit - 1``, of the given shape; ``limit`` is below 2**16 or
        broadcasts to the shape.
        """
        uniform = (self._raw(int(np.prod(shape))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (uniform.reshape(shape) * limit).astype(np.int64)

    def excluding(self, limit: int | NDArray[Any], *excluded: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw one integer of ``0 .. limit - 1`` per element, never one of the ``excluded`` (which differ
        from one another, and may lie beyond the limit); ``limit`` broadcasts to their shape.
        """
        ordered = np.sort(np.stack(excluded), axis=0)
        drawn = self.below(limit - (ordered < limit).sum(axis=0), *excluded[0].shape)
        for value in ordered:
            drawn += drawn >= value
        return drawn

    def normal(self, sd: float, *shape: int) -> NDArray[np.int16]:
        """Draw normally distributed numbers of standard deviation ``sd``, rounded to integers."""
        count = int(np.prod(shape))
        levels = self._raw(-(-count // 4)).view("<u2")[:count]
        drawn: NDArray[np.int16] = _normal_table(sd)[levels].reshape(shape)
        return drawn
