"""The 16 shapes of the objects, and 4 more that no model is trained on, drawn by geometry at any size.

A shape is a region of the unit square (x to the right, y downwards). Its mask at ``size`` pixels is the set
of pixels of which the region covers at least half, measured on an 8 x 8 grid of points in each pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.errors import SpecError

__all__ = ["N_SHAPES", "SHAPE_NAMES", "shape_masks"]

Points = NDArray[np.float64]
Region = NDArray[np.bool_]
_SAMPLES = 8


def _polygon(vertices: Sequence[tuple[float, float]]) -> Callable[[Points, Points], Region]:
    """Return the test for the inside of a simple polygon: an odd number of edges crossed by a ray to the
    right.
    """

    def inside(x: Points, y: Points) -> Region:
        odd = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
        for (x0, y0), (x1, y1) in zip(vertices, [*vertices[1:], vertices[0]], strict=True):
            if y0 == y1:
                continue
            crosses = (y0 > y) != (y1 > y)
            odd ^= crosses & (x < x0 + (y - y0) * ((x1 - x0) / (y1 - y0)))
        return odd

    return inside


def _disc(x: Points, y: Points, *, center: tuple[float, float] = (0.5, 0.5), radius: float = 0.5) -> Region:
    return (x - center[0]) ** 2 + (y - center[1]) ** 2 <= radius**2


def _ring(x: Points, y: Points) -> Region:
    return _disc(x, y) & ~_disc(x, y, radius=0.27)


def _crescent(x: Points, y: Points) -> Region:
    return _disc(x, y) & ~_disc(x, y, center=(0.78, 0.5), radius=0.42)


def _heart(x: Points, y: Points) -> Region:
    lobes = _disc(x, y, center=(0.26, 0.3), radius=0.26) | _disc(x, y, center=(0.74, 0.3), radius=0.26)
    return lobes | _polygon([(0.02, 0.4), (0.26, 0.25), (0.5, 0.25), (0.74, 0.25), (0.98, 0.4), (0.5, 1.0)])(
        x, y
    )


def _saltire(x: Points, y: Points) -> Region:
    return (np.abs(x - y) <= 0.2) | (np.abs(x + y - 1.0) <= 0.2)


def _star() -> list[tuple[float, float]]:
    corners = []
    for k in range(10):
        radius, angle = (0.54 if k % 2 == 0 else 0.22), math.pi * (k / 5 - 0.5)
        corners.append((0.5 + radius * math.cos(angle), 0.54 + radius * math.sin(angle)))
    return corners


_REGIONS: dict[str, Callable[[Points, Points], Region]] = {
    "disc": _disc,
    "square": _polygon([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]),
    "triangle": _polygon([(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]),
    "diamond": _polygon([(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)]),
    "plus": lambda x, y: (np.abs(x - 0.5) <= 0.17) | (np.abs(y - 0.5) <= 0.17),
    "saltire": _saltire,
    "star": _polygon(_star()),
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _polygon(
        [(0.0, 0.32), (0.5, 0.32), (0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.5, 0.68), (0.0, 0.68)]
    ),
    "dome": lambda x, y: _disc(x, y, center=(0.5, 0.78), radius=0.54) & (y <= 0.78) & (y >= 0.24),
    "corner": _polygon([(0.0, 0.0), (0.36, 0.0), (0.36, 0.64), (1.0, 0.64), (1.0, 1.0), (0.0, 1.0)]),
    "tee": _polygon(
        [
            (0.0, 0.0),
            (1.0, 0.0),
            (1.0, 0.34),
            (0.67, 0.34),
            (0.67, 1.0),
            (0.33, 1.0),
            (0.33, 0.34),
            (0.0, 0.34),
        ]
    ),
    "hourglass": lambda x, y: np.abs(x - 0.5) <= np.abs(y - 0.5) + 0.04,
    "horseshoe": _polygon(
        [(0.0, 0.0), (0.3, 0.0), (0.3, 0.68), (0.7, 0.68), (0.7, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    ),
    # Shapes of the out-of-distribution sets.
    "frame": lambda x, y: np.maximum(np.abs(x - 0.5), np.abs(y - 0.5)) >= 0.27,
    "bowtie": lambda x, y: np.abs(y - 0.5) <= np.abs(x - 0.5) + 0.04,
    "chevron": _polygon([(0.0, 0.0), (0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 1.0), (0.5, 0.5)]),
    "checker": lambda x, y: (x < 0.5) == (y < 0.5),
}

SHAPE_NAMES: tuple[str, ...] = tuple(_REGIONS)
"""Shape names; the position is the shape id. The last four are out of distribution."""

N_SHAPES: int = 16
"""How many shapes the objects of training have: ids 0 to 15."""


@lru_cache(maxsize=16)
def shape_masks(size: int) -> NDArray[np.bool_]:
    """Draw every shape at ``size`` x ``size`` pixels: a read-only boolean array ``[20, size, size]``.

    Raises:
        SpecError: ``size`` is below 6 pixels, where the shapes are no longer distinct.
    """
    if size < 6:
        raise SpecError(
            f"The shapes cannot be told apart at {size} px: draw them at 6 px or more (in a cell of 8 px)."
        )
    points = (np.arange(size * _SAMPLES) + 0.5) / (size * _SAMPLES)
    masks = np.empty((len(_REGIONS), size, size), dtype=bool)
    for index, region in enumerate(_REGIONS.values()):
        covered = region(points[None, :], points[:, None]).reshape(size, _SAMPLES, size, _SAMPLES)
        masks[index] = covered.sum(axis=(1, 3)) * 2 >= _SAMPLES**2
    masks.setflags(write=False)
    return masks
