"""Tiles: one small map over the image per layer and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import MUTED, new_figure, styled

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL.Image import Image

__all__ = ["attention_tiles"]

_COLOURS = "magma"
_PIXELS = 96


@styled
def attention_tiles(
    image: Image, tiles: Mapping[tuple[int, int], Float[np.ndarray, "row column"]], *, title: str = ""
) -> Figure:
    """Draw one tile per (layer, head): layers downwards, heads to the right, the image in the corner's place.

    A tile glows where the head attends, over the image in grey, and is scaled by its own maximum, written
    below it.

    Args:
        image: the model's input as a PIL image.
        tiles: (layer, head) to attention ``[row, column]`` over the patch grid, not negative.
        title: above the tiles.

    Raises:
        DataError: there is no tile, or one is no matrix of finite numbers that are not negative.
    """
    if not tiles:
        raise DataError("There is no tile to draw.")
    for (layer, head), values in tiles.items():
        array = np.asarray(values, dtype=float)
        if array.ndim != 2 or not np.isfinite(array).all() or (array < 0).any():
            raise DataError(
                f"The tile of layer {layer}, head {head} must be a matrix of non-negative numbers; it has "
                f"the shape {array.shape}."
            )
    layers, heads = sorted({layer for layer, _ in tiles}), sorted({head for _, head in tiles})
    aspect = image.height / image.width
    # Many tiles are small, few are large.
    side = float(np.clip(9.0 / (len(heads) + 1), 0.55, 1.1))
    figure = new_figure(side * (len(heads) + 1) + 0.5, (side * aspect + 0.16) * len(layers) + 0.55)
    panels = figure.subplots(len(layers), len(heads) + 1, squeeze=False)
    small = image.convert("RGB").resize((_PIXELS, max(1, round(_PIXELS * aspect))))
    grey = np.asarray(small.convert("L"), dtype=float)[..., None] / 255
    colours = matplotlib.colormaps[_COLOURS]
    for row, layer in enumerate(layers):
        for column, axes in enumerate(panels[row]):
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if column == 0:
                if row == 0:
                    axes.imshow(np.asarray(small))
                axes.set_ylabel(f"layer {layer}", fontsize=8, color=MUTED)
                continue
            if (layer, heads[column - 1]) not in tiles:
                continue
            values = np.asarray(tiles[layer, heads[column - 1]], dtype=float)
            share = values / max(values.max(), np.finfo(float).tiny)
            over = np.ix_(
                np.arange(grey.shape[0]) * values.shape[0] // grey.shape[0],
                np.arange(grey.shape[1]) * values.shape[1] // grey.shape[1],
            )
            axes.imshow(0.3 * grey + 0.7 * colours(share)[..., :3][over])
            axes.set_xlabel(f"{values.max():.2f}", fontsize=6.5, color=MUTED, labelpad=1.5)
            if row == 0:
                # Many heads leave room for their numbers alone.
                name = f"head {heads[column - 1]}" if len(heads) <= 12 else f"{heads[column - 1]}"
                axes.set_title(name, fontsize=8, pad=3, fontweight="normal", loc="center")
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), _COLOURS), ax=list(panels[:, -1]), fraction=0.12, pad=0.12,
        aspect=14 * len(layers),
    )  # fmt: skip
    bar.outline.set_visible(False)
    bar.set_ticks([0, 1], labels=["0", "max."])
    bar.ax.tick_params(length=0)
    figure.suptitle(
        f"attention {title}, by layer and head", x=0.01, ha="left", fontsize=10, fontweight="bold"
    )
    return figure
