"""Sheets of images in labelled rows, as papers show their stimuli."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import INK, MUTED, PALETTE, new_figure, styled

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SheetRow", "image_rows"]

_FRAME = "#c9cdd4"


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet.

    Attributes:
        label: left of the row.
        images: from left to right.
        captions: one below each image, or none at all.
        boxes: per image, pixel boxes (x0, y0, x1, y1), half-open, each drawn in a colour of its own.
        heading: above the row.
        gap_before: indices of images that stand apart from those before them.
    """

    label: str
    images: Sequence[Image]
    captions: Sequence[str] = ()
    boxes: Sequence[Sequence[Sequence[float]]] = ()
    heading: str = ""
    gap_before: Mapping[int, str] = field(default_factory=dict)


@styled
def image_rows(rows: Sequence[SheetRow], *, side: float = 1.0) -> Figure:
    """Draw rows of square images, every image ``side`` inches wide.

    Raises:
        DataError: there is no image, or a row has another number of captions or boxes than of images.
    """
    if not any(row.images for row in rows):
        raise DataError("A sheet needs at least one image.")
    for row in rows:
        for what, given in (("captions", row.captions), ("boxes", row.boxes)):
            if given and len(given) != len(row.images):
                raise DataError(
                    f"The row {row.label!r} has {len(row.images)} images but {len(given)} {what}; give one "
                    "each."
                )
    margin, apart, extra = 0.09, 0.05, 0.3
    left = 0.15 + 0.085 * max(len(row.label) for row in rows)
    width = left + 0.05 + max(
        len(row.images) * (side + apart) + extra * len(row.gap_before) for row in rows
    )  # fmt: skip
    heights = [
        side + margin + (0.3 if row.heading else 0) + 0.16 * _lines(row.captions) for row in rows
    ]
    height = sum(heights) + 0.1
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    top = height - 0.04
    for row, tall in zip(rows, heights, strict=True):
        if row.heading:
            place = (0.08 / width, (top - 0.2) / height)
            figure.text(*place, row.heading, fontweight="bold", fontsize=10, color=INK)
        up = top - (0.3 if row.heading else 0.0) - side
        figure.text((left - 0.08) / width, (up + side / 2) / height, row.label, ha="right", va="center")
        x = left
        for index, image in enumerate(row.images):
            if index in row.gap_before:
                x += extra
                note = row.gap_before[index]
                figure.text((x - 0.09) / width, (up + side / 2) / height, note, rotation=90, ha="right",
                            va="center", fontsize=7, color=MUTED)  # fmt: skip
            axes = figure.add_axes((x / width, up / height, side / width, side / height))
            axes.imshow(_shown(image), interpolation="nearest" if image.width < 100 * side else "antialiased")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(visible=True, color=_FRAME, linewidth=0.6)
            for box, color in zip(row.boxes[index] if row.boxes else (), PALETTE, strict=False):
                x0, y0, x1, y1 = box
                # Pixel centres are at whole numbers, so a half-open box starts half a pixel earlier.
                corner, width_of, height_of = (x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0
                axes.add_patch(
                    Rectangle(corner, width_of, height_of, fill=False, edgecolor=color, linewidth=1.2)
                )
            if row.captions:
                axes.set_xlabel(row.captions[index], fontsize=7.5, labelpad=2)
            x += side + apart
        top -= tall
    return figure


def _lines(captions: Sequence[str]) -> int:
    return max((caption.count("\n") + 1 for caption in captions if caption), default=0)


def _shown(image: Image) -> Any:
    return image if image.mode == "L" else image.convert("RGB")
