"""Lines over an image from tokens to the patches that they attend to."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.images import Boxes, box_colours, show_image, stretched, title_and_legend
from vit_mechinterp.figures.style import INK, new_figure, styled

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from PIL.Image import Image

__all__ = ["Links", "attention_links"]

_COLUMNS = 3
_STRONGEST, _LEAST = 3, 0.05
_LINE = "#E69F00"


@dataclass(frozen=True)
class Links:
    """One panel.

    Attributes:
        attention: of every token to every patch ``[query, row, column]``.
        queries: the patches (row-major) that these tokens are.
        note: written below the panel's name.
        view: a pixel box to look at closely, with a patch around it; None shows the whole image.
    """

    attention: Float[np.ndarray, "query row column"]
    queries: Sequence[int]
    note: str = ""
    view: tuple[int, int, int, int] | None = None


@styled
def attention_links(
    image: Image, panels: Mapping[str, Links], *, boxes: Boxes | None = None, title: str = ""
) -> Figure:
    """Draw an image, and once per panel the image dimmed by the attention that its patches receive, with a
    line from every token to the patches that it attends to most.

    Args:
        image: the model's input as a PIL image.
        panels: name to links.
        boxes: name to pixel box, drawn on every panel.
        title: above the panels.

    Raises:
        DataError: there is no panel, or one's attention is no array ``[query, row, column]`` of numbers that
            are not negative, one row per token.
    """
    if not panels:
        raise DataError("A figure of links needs at least one panel.")
    for name, links in panels.items():
        array = np.asarray(links.attention, dtype=float)
        wrong = array.ndim != 3 or not np.isfinite(array).all() or (array < 0).any()
        if wrong or len(array) != len(links.queries):
            raise DataError(
                f"The panel {name!r} must have attention [query, row, column], not negative, for its "
                f"{len(links.queries)} tokens; its shape is {array.shape}."
            )
    colours = box_colours(list(boxes or {}))
    count = len(panels) + 1
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    aspect = image.height / image.width
    figure = new_figure(2.5 * columns + 0.1, (2.4 * aspect + 0.85) * rows + (0.3 if title else 0.05) + 0.3)
    flat = list(figure.subplots(rows, columns, squeeze=False).ravel())
    pixels = np.asarray(image.convert("RGB"), dtype=float) / 255
    show_image(flat[0], image, boxes or {}, colours)
    flat[0].set_xlabel("image", fontsize=8.5)
    for axes, (name, links) in zip(flat[1:], panels.items(), strict=False):
        received = np.asarray(links.attention, dtype=float).mean(axis=0)
        share = received / max(received.max(), np.finfo(float).tiny)
        weight = 0.3 + 0.7 * stretched(share, pixels.shape[:2])[..., None]
        show_image(axes, pixels * weight, boxes or {}, colours)
        _draw_lines(axes, links, (pixels.shape[1], pixels.shape[0]))
        note = "\n".join(textwrap.wrap(links.note, 38))
        axes.set_xlabel(f"{name}\n{note}" if note else name, fontsize=8.5)
    for axes in flat[count:]:
        axes.set_visible(False)
    title_and_legend(figure, title, colours)
    return figure


def _draw_lines(axes: Axes, links: Links, size: tuple[int, int]) -> None:
    attention = np.asarray(links.attention, dtype=float)
    n_rows, n_columns = attention.shape[1:]
    step = size[0] / n_columns, size[1] / n_rows

    def centre(patch: int) -> tuple[float, float]:
        row, column = divmod(patch, n_columns)
        return (column + 0.5) * step[0] - 0.5, (row + 0.5) * step[1] - 0.5

    for query, row in zip(links.queries, attention.reshape(len(attention), -1), strict=True):
        x, y = centre(query)
        (ring,) = axes.plot(x, y, marker="o", markersize=7, markerfacecolor="none", color=INK, zorder=4)
        ring.set_path_effects([withStroke(linewidth=2.6, foreground="white")])
        for patch in np.argsort(-row)[:_STRONGEST]:
            if row[patch] < _LEAST:
                continue
            if patch == query:
                axes.plot(x, y, marker="o", markersize=1.5 + 4 * row[patch], color=_LINE, zorder=5)
                continue
            width = 0.5 + 3.0 * float(row[patch])
            arrow = {
                "arrowstyle": "-|>", "color": _LINE, "linewidth": width, "shrinkA": 3.5, "shrinkB": 2,
                "mutation_scale": 8, "connectionstyle": "arc3,rad=0.12",
                "path_effects": [withStroke(linewidth=width + 0.8, foreground=INK)],
            }  # fmt: skip
            axes.annotate("", centre(int(patch)), (x, y), arrowprops=arrow, annotation_clip=True, zorder=5)
    if links.view is not None:
        x0, y0, x1, y1 = links.view
        side = max(x1 - x0 + 2 * step[0], y1 - y0 + 2 * step[1])
        left = float(np.clip((x0 + x1 - side) / 2, 0, max(0, size[0] - side)))
        top = float(np.clip((y0 + y1 - side) / 2, 0, max(0, size[1] - side)))
        axes.set_xlim(left - 0.5, left + side - 0.5)
        axes.set_ylim(top + side - 0.5, top - 0.5)
