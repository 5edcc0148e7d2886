"""Smooth random fields and sharp grids, the stuff that textures are made of."""

from __future__ import annotations

import numpy as np

from vit_mechinterp.stimuli.realistic.mesh import Floats
from vit_mechinterp.stimuli.streams import Stream

__all__ = ["blend", "cells", "clouds", "grid", "stretch", "uniform"]

_LEVELS = 1 << 15


def uniform(stream: Stream, *shape: int, low: float = 0.0, high: float = 1.0) -> Floats:
    """Draw numbers uniformly from ``low`` to ``high``, of the given shape."""
    return low + (high - low) * (stream.below(_LEVELS, *shape) + 0.5) / _LEVELS


def grid(size: int) -> tuple[Floats, Floats]:
    """Return x (to the right) and y (downwards), 0 to 1, at the pixels of a square ``[size, size]``."""
    line = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(line, line, indexing="xy")
    return x, y


def clouds(
    stream: Stream, size: int, scale: tuple[int, int], *, octaves: int = 5, decay: float = 0.55
) -> Floats:
    """Return a smooth random field ``[size, size]`` from 0 to 1 that repeats without a seam.

    ``scale`` counts the coarsest bumps along y and x; every octave has bumps half as large and ``decay``
    times as high as the one before.
    """
    total, height = np.zeros((size, size)), 1.0
    for octave in range(octaves):
        rows, columns = (min(n << octave, size // 2) for n in scale)
        lattice = uniform(stream, rows, columns)
        total += height * _interpolated(_interpolated(lattice, size).T, size).T
        height *= decay
    return stretch(total)


def _interpolated(lattice: Floats, size: int) -> Floats:
    """Interpolate along the first axis, smoothly and periodically."""
    n = len(lattice)
    at = np.arange(size) * n / size
    left = at.astype(int)
    t = (at - left)[:, None]
    t = t * t * (3 - 2 * t)
    field: Floats = lattice[left % n] * (1 - t) + lattice[(left + 1) % n] * t
    return field


def stretch(field: Floats) -> Floats:
    """Scale a field to run from 0 to 1."""
    low, high = float(field.min()), float(field.max())
    return (field - low) / max(high - low, 1e-9)


def blend(low: Floats, high: Floats, share: Floats) -> Floats:
    """Mix two colours ``[3]`` (or images ``[h, w, 3]``) by a field ``[h, w]`` from 0 to 1."""
    weight = np.clip(share, 0, 1)[..., None]
    return low * (1 - weight) + high * weight


def cells(
    size: int, rows: int, columns: int, *, shift: float = 0.0
) -> tuple[Floats, Floats, np.ndarray, np.ndarray]:
    """Divide a square into rows and columns, every other row shifted by a share of a column.

    Returns:
        For every pixel the place within its cell (x and y, 0 to 1) and the cell's row and column.
    """
    x, y = grid(size)
    row = (y * rows).astype(int)
    across = x * columns + shift * (row % 2)
    return across % 1.0, (y * rows) % 1.0, row, across.astype(int) % columns
