"""Where objects may stand: canvas, patch grid, object cells, and the tokens they cover."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.errors import SpecError

__all__ = ["Geometry"]


@dataclass(frozen=True)
class Geometry:
    """A square canvas with a patch grid, on which square object cells stand with their corners on the grid.

    Attributes:
        canvas: side of the image in pixels, a multiple of ``patch``.
        patch: side of a patch in pixels.
        cell: side of an object's cell in pixels; the object is drawn at ``cell - cell // 4`` pixels and
            shifted inside its cell by ``0 .. cell // 4`` pixels (both ends possible) in x and in y.
    """

    canvas: int = 224
    patch: int = 16
    cell: int = 32

    def __post_init__(self) -> None:
        if min(self.canvas, self.patch, self.cell) < 1 or self.canvas % self.patch:
            raise SpecError(
                f"canvas={self.canvas}, patch={self.patch}, cell={self.cell}: all three are positive pixel "
                "counts, and the canvas is a multiple of the patch."
            )
        if self.span * 2 > self.grid:
            raise SpecError(
                f"Two cells of {self.cell} px, {self.span} x {self.span} patches of {self.patch} px each, "
                f"do not fit side by side on a canvas of {self.canvas} px: use a larger canvas or smaller "
                "cells."
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the canvas."""
        return self.canvas // self.patch

    @property
    def span(self) -> int:
        """Patches along one side of a cell (a cell that ends inside a patch covers the whole patch)."""
        return -(-self.cell // self.patch)

    @property
    def drawn(self) -> int:
        """Side of a drawn object in pixels."""
        return self.cell - self.cell // 4

    @property
    def max_shift(self) -> int:
        """The largest shift of an object inside its cell in pixels."""
        return self.cell // 4

    @property
    def tokens_per_object(self) -> int:
        """Patch tokens that an object's cell covers."""
        return self.span**2

    def corner_pairs(self) -> NDArray[np.int64]:
        """Corners (x, y in pixels) of all ordered pairs of cells that share no patch: ``[pairs, 2, 2]``."""
        return _corner_pairs(self.grid, self.span) * self.patch

    def boxes(self, corner: NDArray[np.int64]) -> NDArray[np.int64]:
        """Turn corners ``[..., 2]`` into the boxes of their cells ``[..., 4]``: (x0, y0, x1, y1), half-open,
        in pixels.
        """
        return np.concatenate([corner, corner + self.cell], axis=-1)

    def tokens(self, corner: NDArray[np.int64]) -> NDArray[np.int64]:
        """Turn corners ``[..., 2]`` into patch indices ``[..., tokens_per_object]``: row-major, prefix tokens
        not counted.
        """
        steps = np.arange(self.span)
        within = (steps[:, None] * self.grid + steps[None, :]).reshape(-1)
        first = (corner[..., 1] // self.patch) * self.grid + corner[..., 0] // self.patch
        return np.asarray(first[..., None] + within, dtype=np.int64)


@lru_cache(maxsize=8)
def _corner_pairs(grid: int, span: int) -> NDArray[np.int64]:
    steps = np.arange(grid - span + 1)
    corners = np.stack(np.meshgrid(steps, steps, indexing="xy"), axis=-1).reshape(-1, 2)
    apart = (np.abs(corners[:, None] - corners[None, :]) >= span).any(axis=-1)
    first, second = np.nonzero(apart)
    return np.stack([corners[first], corners[second]], axis=1)
