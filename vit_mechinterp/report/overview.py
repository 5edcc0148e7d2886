"""One picture of several figures, for a README."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vit_mechinterp.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["overview"]

_MARGIN, _TITLE = 28, 46
_INK = "#22262e"


def overview(panels: Mapping[str, Figure], *, columns: int = 2, width: int = 1600) -> Image:
    """Return figures in a grid, each with its title above it, as one image.

    Args:
        panels: title to figure, in reading order.
        columns: figures in a row.
        width: of the whole image in pixels.

    Raises:
        DataError: there is no figure.
    """
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    if not panels:
        raise DataError("An overview needs at least one figure.")
    across = (width - _MARGIN * (columns + 1)) // columns
    pictures = [_fitted(figure, across) for figure in panels.values()]
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [_TITLE + max(picture.height for picture in row) + _MARGIN for row in rows]
    whole = Image.new("RGB", (width, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(whole)
    # The bold face that matplotlib ships, so that the picture looks the same everywhere.
    bold = font_manager.FontProperties(family="DejaVu Sans", weight="bold")
    font = ImageFont.truetype(font_manager.findfont(bold), 23)
    titles = iter(panels)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            left = _MARGIN + column * (across + _MARGIN)
            draw.text((left, top), next(titles), fill=_INK, font=font)
            whole.paste(picture, (left, top + _TITLE))
        top += height
    return whole


def _fitted(figure: Figure, width: int) -> Image:
    """Draw a figure at the resolution that makes it ``width`` pixels wide."""
    from PIL import Image

    from vit_mechinterp.figures.style import png_bytes

    # A resolution is a whole number of dots, so the last pixels are a matter of scaling.
    dpi = math.ceil(width / figure.get_figwidth())
    picture = Image.open(io.BytesIO(png_bytes(figure, dpi=dpi))).convert("RGB")
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
