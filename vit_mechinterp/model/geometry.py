"""Where a pixel of the original image ends up in the model's input.

A `Geometry` is the list of resizes and crops that a preprocessing applies, each with the library's own
rounding, so a box given in the original image's pixels can be followed into model-input pixels and from there
to patches.
Boxes are ``(x0, y0, x1, y1)``, half-open; sizes are ``(width, height)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from vit_mechinterp.errors import DataError

__all__ = [
    "Box",
    "CenterCrop",
    "Geometry",
    "ResizeExact",
    "ResizeInside",
    "ResizeShortest",
    "Size",
    "Step",
    "TrimBorder",
    "patches_of_box",
]

Box = tuple[float, float, float, float]
Size = tuple[int, int]

# A mapped edge meant to fall on a patch border misses it by float rounding: that is no overlap.
_TOLERANCE = 1e-6


class Step(Protocol):
    """One resize or crop: the size it makes, and where it moves the origin."""

    def output_size(self, size: Size) -> Size:
        """Return the ``(width, height)`` of the image after this step."""

    def offset(self, size: Size) -> tuple[int, int]:
        """Return how far the old origin moves ``(right, down)``, in pixels after the step."""

    @property
    def scales(self) -> bool:
        """Whether the step resamples (True) or cuts and pads (False)."""


class _Resize:
    scales = True

    def offset(self, size: Size) -> tuple[int, int]:
        return 0, 0


@dataclass(frozen=True)
class ResizeExact(_Resize):
    """Resize to exactly ``height x width``; the aspect ratio is not kept."""

    height: int
    width: int

    def output_size(self, size: Size) -> Size:
        return self.width, self.height


@dataclass(frozen=True)
class ResizeShortest(_Resize):
    """Resize the shortest edge to ``edge``, the other in proportion (rounded down), as torchvision does.

    ``longest`` bounds the other edge: where it would be exceeded the shortest edge gives way.
    """

    edge: int
    longest: int | None = None

    def output_size(self, size: Size) -> Size:
        short, long = min(size), max(size)
        edge: float = self.edge
        if self.longest is not None and long / short * edge > self.longest:
            edge = self.longest * short / long
        new_short = round(edge)
        new_long = long if short == new_short else int(edge * long / short)
        return (new_short, new_long) if size[0] <= size[1] else (new_long, new_short)


@dataclass(frozen=True)
class ResizeInside(_Resize):
    """Resize in proportion until the image fits (``inside``) or covers ``height x width``, as timm does."""

    height: int
    width: int
    inside: bool = False

    def output_size(self, size: Size) -> Size:
        ratios = size[1] / self.height, size[0] / self.width
        ratio = max(ratios) if self.inside else min(ratios)
        return round(size[0] / ratio), round(size[1] / ratio)


@dataclass(frozen=True)
class CenterCrop:
    """Cut ``height x width`` from the centre, and pad evenly where the image is smaller.

    ``rounding`` says what half a pixel becomes: ``"nearest"`` (torchvision and timm, to even) or ``"down"``
    (transformers).
    """

    height: int
    width: int
    rounding: Literal["nearest", "down"] = "nearest"
    scales = False

    def output_size(self, size: Size) -> Size:
        return self.width, self.height

    def offset(self, size: Size) -> tuple[int, int]:
        return self._along(size[0], self.width), self._along(size[1], self.height)

    def _along(self, have: int, want: int) -> int:
        if want > have:
            return (want - have) // 2
        half = (have - want) / 2
        return -(round(half) if self.rounding == "nearest" else int(half))


@dataclass(frozen=True)
class TrimBorder:
    """Cut ``border`` pixels from every side."""

    border: int
    scales = False

    def output_size(self, size: Size) -> Size:
        return max(size[0] - 2 * self.border, 0), max(size[1] - 2 * self.border, 0)

    def offset(self, size: Size) -> tuple[int, int]:
        return -self.border, -self.border


@dataclass(frozen=True)
class Geometry:
    """The resizes and crops of a preprocessing, in order.

    ``unknown`` names a step whose effect on positions is not known; then `map_box` refuses to guess.
    """

    steps: tuple[Step, ...] = ()
    unknown: str | None = None

    def input_size(self, original_size: Size) -> Size:
        """Return the ``(width, height)`` of the model input made from an image of ``original_size``.

        Raises:
            DataError: the geometry of the preprocessing is not known.
        """
        self._require_known()
        size = original_size
        for step in self.steps:
            size = step.output_size(size)
        return size

    def keeps(self, original_size: Size) -> bool:
        """Whether an image of this size reaches the model pixel for pixel, neither resized nor cut."""
        return self.unknown is None and all(
            step.output_size(original_size) == original_size and step.offset(original_size) == (0, 0)
            for step in self.steps
        )

    def map_box(self, box: Sequence[float], original_size: Size) -> Box:
        """Carry a pixel box of the original image into pixels of the model input.

        Args:
            box: ``(x0, y0, x1, y1)``, half-open, in pixels of the original image.
            original_size: ``(width, height)`` of that image, as ``PIL.Image.size`` gives it.

        Returns:
            The box in model-input pixels, cut to what the model sees.

        Raises:
            DataError: the box is malformed, nothing of it is left after the crop, or the geometry is unknown.
        """
        self._require_known()
        x0, y0, x1, y1 = _checked(box)
        size = original_size
        x0, y0, x1, y1 = _clipped((x0, y0, x1, y1), size)
        for step in self.steps:
            new = step.output_size(size)
            if step.scales:
                across, down = new[0] / size[0], new[1] / size[1]
                x0, y0, x1, y1 = x0 * across, y0 * down, x1 * across, y1 * down
            else:
                right, below = step.offset(size)
                x0, y0, x1, y1 = x0 + right, y0 + below, x1 + right, y1 + below
            x0, y0, x1, y1 = _clipped((x0, y0, x1, y1), new)
            size = new
        if x1 - x0 <= _TOLERANCE or y1 - y0 <= _TOLERANCE:
            raise DataError(
                f"Nothing of the box {tuple(box)} is left in the model's input: the image of width x height "
                f"{original_size[0]} x {original_size[1]} is resized and cropped to {size[0]} x {size[1]}. "
                "Choose boxes inside the crop, or give the images at the model's input size."
            )
        return x0, y0, x1, y1

    def _require_known(self) -> None:
        if self.unknown is not None:
            raise DataError(
                f"Pixel boxes cannot be carried through this preprocessing: {self.unknown}. "
                'Select tokens by patch index instead ({"column": name}), or pass images as tensors of the '
                "model's input size."
            )


def patches_of_box(box: Sequence[float], patch_size: int | tuple[int, int], grid: Sequence[int]) -> list[int]:
    """Return the row-major indices of every patch that a box touches.

    Args:
        box: ``(x0, y0, x1, y1)``, half-open, in model-input pixels (see `Geometry.map_box`).
        patch_size: edge of a patch in pixels, or ``(height, width)``.
        grid: ``(rows, columns)`` of patches; with a leading axis, ``(frames, rows, columns)``, the box
            selects the same patches in every frame.

    Raises:
        DataError: the box is malformed or lies outside the grid.
    """
    x0, y0, x1, y1 = _checked(box)
    patch_height, patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    n_rows, n_columns = grid[-2], grid[-1]
    rows = _touched(y0, y1, patch_height, n_rows)
    columns = _touched(x0, x1, patch_width, n_columns)
    if not rows or not columns:
        raise DataError(
            f"The box {tuple(box)} touches no patch: the grid of {n_rows} x {n_columns} patches of "
            f"{patch_height} x {patch_width} pixels ends at x = {n_columns * patch_width}, "
            f"y = {n_rows * patch_height}. Boxes are (x0, y0, x1, y1) in model-input pixels."
        )
    return [
        (frame * n_rows + row) * n_columns + column
        for frame in range(math.prod(grid[:-2]))
        for row in rows
        for column in columns
    ]


def _touched(start: float, stop: float, patch: int, count: int) -> range:
    first = math.floor((start + _TOLERANCE) / patch)
    last = math.ceil((stop - _TOLERANCE) / patch)
    return range(max(first, 0), min(last, count))


def _checked(box: Sequence[float]) -> Box:
    edges = [float(edge) for edge in box]
    if len(edges) == 4 and all(map(math.isfinite, edges)):
        x0, y0, x1, y1 = edges
        if x0 < x1 and y0 < y1:
            return x0, y0, x1, y1
    raise DataError(
        f"{tuple(edges)} is not a box: expected (x0, y0, x1, y1) in pixels with x0 < x1 and y0 < y1."
    )


def _clipped(box: Box, size: Size) -> Box:
    (x0, y0, x1, y1), (width, height) = box, size
    return min(max(x0, 0), width), min(max(y0, 0), height), max(min(x1, width), 0), max(min(y1, height), 0)
