"""Words over an image: what is read from every patch, one colour per word, one panel per layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import PALETTE, new_figure, styled

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL.Image import Image

__all__ = ["word_maps"]

_MOST_COLUMNS = 7
_OTHER = "#b9bec7"


@styled
def word_maps(
    image: Image,
    words: Mapping[str, Any],
    strengths: Mapping[str, Float[np.ndarray, "row column"]] | None = None,
    *,
    title: str = "",
) -> Figure:
    """Draw an image, then once per map the image in grey with every patch in the colour of its word.

    The commonest words have a colour each, all others are grey; words stand below, the commonest first.

    Args:
        image: as the model sees it.
        words: name (``"layer 3"``) to words ``[row, column]`` over the patch grid.
        strengths: name to numbers ``[row, column]`` in 0..1, such as probabilities: how strong the colours
            are.
        title: above the panels.

    Raises:
        DataError: there is no map, or one is no matrix, or strengths have another shape.
    """
    grids = {name: np.asarray(grid, dtype=object) for name, grid in words.items()}
    if not grids:
        raise DataError("Words over an image need at least one map.")
    for name, grid in grids.items():
        if grid.ndim != 2:
            raise DataError(f"The map {name!r} must be a matrix [row, column]; its shape is {grid.shape}.")
        if strengths is not None and np.shape(strengths[name]) != grid.shape:
            shape = np.shape(strengths[name])
            raise DataError(f"The strengths of {name!r} have the shape {shape}, its words {grid.shape}.")
    counts = Counter(str(word) for grid in grids.values() for word in grid.ravel())
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    colours = dict(zip(ranked, PALETTE, strict=False))
    n_panels = 1 + len(grids)
    rows = math.ceil(n_panels / _MOST_COLUMNS)
    columns = math.ceil(n_panels / rows)
    aspect = image.height / image.width
    figure = new_figure(1.42 * columns + 0.1, (1.36 * aspect + 0.3) * rows + (0.75 if title else 0.5))
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    small = image.convert("RGB")
    ground = 0.45 + 0.5 * np.asarray(small.convert("L"), dtype=float)[..., None] / 255
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.set_visible(False)
        for spine in axes.spines.values():
            spine.set(visible=True, color="#dde1e7", linewidth=0.8)
    shown = [("image", np.asarray(small))]
    for name, grid in grids.items():
        strength = np.ones(grid.shape) if strengths is None else np.asarray(strengths[name], dtype=float)
        tint = np.array([[to_rgb(colours.get(str(word), _OTHER)) for word in row] for row in grid])
        weight = (0.2 + 0.7 * np.clip(np.nan_to_num(strength), 0, 1))[..., None]
        at = np.ix_(*(np.arange(n) * k // n for n, k in zip(ground.shape[:2], grid.shape, strict=True)))
        shown.append((name, (1 - weight[at]) * ground + weight[at] * tint[at]))
    for axes, (name, pixels) in zip(panels, shown, strict=False):
        axes.set_visible(True)
        axes.imshow(pixels)
        axes.set_xlabel(name, fontsize=8.5, labelpad=4)
    handles: list[Any] = [Patch(facecolor=colour, label=_short(word)) for word, colour in colours.items()]
    if len(ranked) > len(colours):
        handles.append(Patch(facecolor=_OTHER, label=f"{len(ranked) - len(colours)} others"))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=min(len(handles), max(2, columns)), handlelength=1.0
    )
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def _short(word: str) -> str:
    return word if len(word) <= 24 else f"{word[:23]}…"
