"""Figures made of images: contact sheets of stimuli, and attention laid over an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import PALETTE, new_figure, styled

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL.Image import Image

__all__ = [
    "attention_overlay",
    "box_colours",
    "contact_sheet",
    "show_image",
    "stretched",
    "title_and_legend",
]

Boxes = Mapping[str, Sequence[float]]


def box_colours(names: Sequence[str]) -> dict[str, str]:
    """Give every box name its colour, in order of appearance."""
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(dict.fromkeys(names))}


@styled
def contact_sheet(
    images: Sequence[Image],
    *,
    boxes: Sequence[Boxes] | None = None,
    captions: Sequence[str] | None = None,
    columns: int = 4,
    title: str = "",
) -> Figure:
    """Draw images in a grid, with their boxes and a caption below each.

    Args:
        images: PIL images.
        boxes: per image, name to pixel box ``(x0, y0, x1, y1)``, half-open; one colour per name.
        captions: per image.
        columns: images in a row.
        title: above the grid.

    Raises:
        DataError: there is no image, or the numbers of boxes or captions differ from it.
    """
    if not images:
        raise DataError("A contact sheet needs at least one image.")
    for what, given in (("boxes", boxes), ("captions", captions)):
        if given is not None and len(given) != len(images):
            raise DataError(f"There are {len(images)} images but {len(given)} {what}; give one per image.")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    colours = box_colours([name for one in boxes or () for name in one])
    extra = (0.3 if title else 0.05) + (0.3 if colours else 0.0)
    figure = new_figure(1.6 * columns + 0.1, (1.85 if captions else 1.65) * rows + extra)
    panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for index, axes in enumerate(panels):
        if index >= len(images):
            axes.set_visible(False)
            continue
        show_image(axes, images[index], boxes[index] if boxes else {}, colours)
        if captions:
            axes.set_xlabel(captions[index], fontsize=8.5, labelpad=4)
    title_and_legend(figure, title, colours)
    return figure


@styled
def attention_overlay(
    image: Image,
    maps: Mapping[str, Float[np.ndarray, "row column"]],
    *,
    boxes: Boxes | None = None,
    title: str = "",
) -> Figure:
    """Draw an image, then once per map the image dimmed by the attention that its patches receive.

    Args:
        image: the model's input as a PIL image.
        maps: name (``"layer 3, head 1"``) to attention ``[row, column]`` over the patch grid; each is scaled
            by its own maximum, which is written into its caption.
        boxes: name to pixel box, drawn on every panel (the query's patches, the objects).
        title: above the panels.

    Raises:
        DataError: there is no map, or a map is not a matrix of finite, non-negative numbers.
    """
    if not maps:
        raise DataError("An attention overlay needs at least one map.")
    colours = box_colours(list(boxes or {}))
    columns = min(len(maps) + 1, 5)
    rows = math.ceil((len(maps) + 1) / columns)
    lines = max(name.count("\n") for name in maps)
    figure = new_figure(
        1.75 * columns + 0.1,
        (2.1 + 0.16 * lines) * rows + (0.3 if title else 0.05) + (0.3 if colours else 0.0),
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    pixels = np.asarray(image.convert("RGB"), dtype=float) / 255
    show_image(panels[0], image, boxes or {}, colours)
    panels[0].set_xlabel("image", fontsize=8.5)
    for axes, (name, attention) in zip(panels[1:], maps.items(), strict=False):
        received = np.asarray(attention, dtype=float)
        if received.ndim != 2 or not np.isfinite(received).all() or (received < 0).any():
            raise DataError(
                f"The attention map {name!r} must be a matrix [row, column] of non-negative numbers; "
                f"it has the shape {received.shape}."
            )
        share = received / max(received.max(), np.finfo(float).tiny)
        weight = 0.12 + 0.88 * stretched(share, pixels.shape[:2])[..., None]
        show_image(axes, pixels * weight, boxes or {}, colours)
        axes.set_xlabel(f"{name}\nmax. {received.max():.2f}", fontsize=8.5)
    for axes in panels[len(maps) + 1 :]:
        axes.set_visible(False)
    title_and_legend(figure, title, colours)
    return figure


def show_image(axes: Axes, image: Any, boxes: Boxes, colours: Mapping[str, str]) -> None:
    """Draw an image with its boxes, without ticks."""
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
    for name, (x0, y0, x1, y1) in boxes.items():
        # Pixel centres are at whole numbers, so a half-open box starts half a pixel earlier.
        corner = (x0 - 0.5, y0 - 0.5)
        frame = Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=colours[name], linewidth=1.6)
        # A white rim keeps every colour visible on a dark ground.
        frame.set_path_effects([withStroke(linewidth=3.0, foreground="white")])
        axes.add_patch(frame)


def title_and_legend(figure: Figure, title: str, colours: Mapping[str, str]) -> None:
    """Write the title above the panels, and below them what the colours of the boxes mean."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    if colours:
        handles = [Line2D([], [], color=color, linewidth=2) for color in colours.values()]
        figure.legend(handles, list(colours), loc="outside lower center", ncols=len(colours))


def stretched(
    values: Float[np.ndarray, "row column"], shape: tuple[int, ...]
) -> Float[np.ndarray, "height width"]:
    """Repeat every patch's value over its pixels."""
    rows = np.arange(shape[0]) * values.shape[0] // shape[0]
    columns = np.arange(shape[1]) * values.shape[1] // shape[1]
    return values[np.ix_(rows, columns)]
