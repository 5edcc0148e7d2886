"""Values over an image: one panel per layer, coloured patch by patch at the model's own grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import COOLWARM, new_figure, styled

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from PIL.Image import Image

__all__ = ["position_maps", "round_up"]

_MOST_COLUMNS = 7


@styled
def position_maps(
    images: Mapping[str, Image],
    maps: Mapping[str, Float[np.ndarray, "row column"]],
    *,
    limits: tuple[float, float],
    least: float = -math.inf,
    label: str = "",
    title: str = "",
) -> Figure:
    """Draw some images, then once per map the first image in grey with its patches coloured by value.

    The colour gets stronger with the distance from the middle of ``limits``, so that the image shows where
    nothing happens.

    Args:
        images: name to image as the model sees it; the maps lie over the first.
        maps: name (``"layer 3"``) to values ``[row, column]`` over the patch grid; NaN leaves a patch bare.
        limits: the values of the two ends of the colours.
        least: the least value that there can be; the colour bar begins there if it lies within ``limits``.
        label: what the colours measure.
        title: above the panels.

    Raises:
        DataError: there is no image or no map, or a map is no matrix.
    """
    if not images or not maps:
        raise DataError("Maps over an image need at least one image and one map.")
    for name, values in maps.items():
        if np.ndim(values) != 2:
            shape = np.shape(values)
            raise DataError(f"The map {name!r} must be a matrix [row, column]; its shape is {shape}.")
    n_panels = len(images) + len(maps)
    rows = math.ceil(n_panels / _MOST_COLUMNS)
    columns = math.ceil(n_panels / rows)
    first = next(iter(images.values()))
    aspect = first.height / first.width
    figure = new_figure(1.42 * columns + 0.95, (1.36 * aspect + 0.3) * rows + (0.3 if title else 0.05))
    panels = figure.subplots(rows, columns, squeeze=False)
    flat = list(panels.ravel())
    for axes, (name, image) in zip(flat, images.items(), strict=False):
        _bare(axes, name)
        axes.imshow(np.asarray(image.convert("RGB")))
    colours = matplotlib.colormaps[COOLWARM]
    norm = Normalize(*limits, clip=True)
    grey = np.asarray(first.convert("L"), dtype=float)[..., None] / 255
    ground = 0.25 + 0.7 * np.repeat(grey, 3, axis=2)
    for axes, (name, values) in zip(flat[len(images) :], maps.items(), strict=False):
        _bare(axes, name)
        axes.imshow(_blended(ground, np.asarray(values, dtype=float), colours, norm))
    for axes in flat[n_panels:]:
        axes.set_visible(False)
    bar = figure.colorbar(
        ScalarMappable(norm, COOLWARM), ax=list(panels[:, -1]), fraction=0.11, pad=0.06, aspect=14 * rows
    )
    bar.outline.set_visible(False)
    bar.set_label(label)
    low, high = limits
    bottom, middle = max(low, least), (low + high) / 2
    bar.ax.set_ylim(bottom, high)
    # Two numbers that nearly meet could not be read.
    ticks = [bottom, middle, high] if middle - bottom > 0.1 * (high - bottom) else [middle, high]
    bar.set_ticks(ticks, labels=[f"{v:.3g}" for v in ticks])
    bar.ax.tick_params(length=0)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def round_up(value: float) -> float:
    """Return the next of 1, 1.5, 2, 3, 5, 7.5, 10, ...: a round number for a colour bar to end at."""
    if not math.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(s * power for s in (1, 1.5, 2, 3, 5, 7.5, 10) if s * power >= value * (1 - 1e-9))


def _bare(axes: Axes, name: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color="#dde1e7", linewidth=0.8)
    axes.set_xlabel(name, fontsize=8.5, labelpad=4)


def _blended(
    ground: Float[np.ndarray, "height width 3"],
    values: Float[np.ndarray, "row column"],
    colours: matplotlib.colors.Colormap,
    norm: Normalize,
) -> Float[np.ndarray, "height width 3"]:
    """Lay every patch's colour over its pixels, the stronger the further its value lies from the middle."""
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 0.0)
    middle, reach = (low + high) / 2, max((high - low) / 2, np.finfo(float).tiny)
    strength = np.nan_to_num(np.minimum(np.abs(values - middle) / reach, 1.0)) ** 0.6 * 0.88
    tint = colours(np.asarray(norm(np.nan_to_num(values, nan=middle))))[..., :3]
    at_row = np.arange(ground.shape[0]) * values.shape[0] // ground.shape[0]
    at_column = np.arange(ground.shape[1]) * values.shape[1] // ground.shape[1]
    over = np.ix_(at_row, at_column)
    weight = strength[over][..., None]
    blended: Float[np.ndarray, "height width 3"] = (1 - weight) * ground + weight * tint[over]
    return blended
