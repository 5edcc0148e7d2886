"""Heat maps over layers: one row per head, or one row per condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import COOLWARM, layer_axis, new_figure, styled

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["colour_bar", "condition_map", "draw_heat", "head_layer_map"]

# Beyond this many cells the numbers are too small to read, and the colours must do.
_MAX_NUMBERED_CELLS = 90


@styled
def head_layer_map(
    values: Float[np.ndarray, "layer head"],
    *,
    title: str = "",
    label: str = "",
    ends: tuple[str, str] = ("local", "global"),
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Draw one cell per head and layer: layers along x, heads along y (paper A, Fig. 2, above).

    Args:
        values: ``[layer, head]``; NaN cells stay empty.
        title: above the axes.
        label: what the colours measure.
        ends: what the lowest and the highest colour mean.
        limits: the fixed range of the colours; a figure never rescales itself to its data.
    """
    table = _matrix(values, "[layer, head]").T
    n_heads, n_layers = table.shape
    figure = new_figure(1.7 + 0.42 * max(n_layers, 6), 1.1 + 0.3 * max(n_heads, 4))
    axes = figure.add_subplot()
    image = draw_heat(axes, table, limits=limits)
    axes.set_ylabel("head")
    axes.set_yticks(range(0, n_heads, 1 if n_heads <= 16 else 2))
    axes.set_title(title)
    colour_bar(axes, image, label=label, ends=ends, limits=limits)
    return figure


@styled
def condition_map(
    values: Float[np.ndarray, "layer condition"],
    conditions: Sequence[str],
    *,
    title: str = "",
    label: str = "",
    ends: tuple[str, str] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Draw one cell per condition and layer: layers along x, one named row per condition.

    Args:
        values: ``[layer, condition]``; NaN cells stay empty.
        conditions: names of the rows, the first on top.
        title: above the axes.
        label: what the colours measure.
        ends: what the lowest and the highest colour mean, if words say it better than numbers.
        limits: the fixed range of the colours.

    Raises:
        DataError: the number of names differs from the number of columns.
    """
    table = _matrix(values, "[layer, condition]").T
    n_conditions, n_layers = table.shape
    if len(conditions) != n_conditions:
        raise DataError(
            f"{len(conditions)} conditions are named ({', '.join(conditions)}), "
            f"but the values have {n_conditions} columns."
        )
    longest = max(len(name) for name in conditions)
    figure = new_figure(1.6 + 0.075 * longest + 0.52 * max(n_layers, 6), 1.1 + 0.42 * max(n_conditions, 3))
    axes = figure.add_subplot()
    image = draw_heat(axes, table, limits=limits)
    axes.set_yticks(range(n_conditions), conditions)
    axes.set_title(title)
    colour_bar(axes, image, label=label, ends=ends, limits=limits)
    return figure


def draw_heat(
    axes: Axes, table: Float[np.ndarray, "row layer"], *, limits: tuple[float, float], numbers: bool = True
) -> AxesImage:
    """Draw a matrix into ``axes`` with white seams between the cells, and small numbers where they fit."""
    n_rows, n_layers = table.shape
    image = axes.imshow(table, cmap=COOLWARM, vmin=limits[0], vmax=limits[1], aspect="auto")
    layer_axis(axes, n_layers)
    axes.set_xticks(np.arange(n_layers + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n_rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if numbers and table.size <= _MAX_NUMBERED_CELLS:
        _write_numbers(axes, table, image.get_cmap(), limits)
    return image


def _write_numbers(
    axes: Axes, table: Float[np.ndarray, "row layer"], colours: Colormap, limits: tuple[float, float]
) -> None:
    low, high = limits
    for (row, layer), value in np.ndenumerate(table):
        if np.isfinite(value):
            red, green, blue, _ = colours(float((value - low) / (high - low)))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            value = round(float(value), 2) + 0.0  # no minus before a zero
            text = f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.1f}"
            axes.text(
                layer, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "#2b2f36"
            )


def colour_bar(
    axes: Axes,
    image: AxesImage,
    *,
    label: str,
    ends: tuple[str, str] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Put a colour bar close to the right of ``axes``, with three ticks and words at its ends."""
    inches = axes.get_figure(root=True).get_figwidth()  # type: ignore[union-attr]
    place = axes.inset_axes((1.0 + 0.16 / inches, 0.04, 0.16 / inches, 0.92))
    bar = axes.get_figure(root=True).colorbar(image, cax=place)  # type: ignore[union-attr]
    for spine in place.spines.values():
        spine.set_visible(False)
    bar.set_label(label)
    low, high = limits
    words = {low: ends[0], high: ends[1]} if ends else {}
    ticks = [low, (low + high) / 2, high]
    bar.set_ticks(ticks, labels=[f"{tick:g} {words.get(tick, '')}".strip() for tick in ticks])
    place.tick_params(length=0)


def _matrix(values: Float[np.ndarray, "layer column"], shape: str) -> Float[np.ndarray, "layer column"]:
    array = np.asarray(values, dtype=float)
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"A heat map takes a matrix {shape}; these values have the shape {array.shape}.")
    return array
