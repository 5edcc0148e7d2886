"""Matrices of nodes by nodes: what every sender does to every receiver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.heatmaps import colour_bar
from vit_mechinterp.figures.style import COOLWARM, MUTED, new_figure, styled

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes

__all__ = ["node_matrix"]

_MOST_LABELS = 40
_GROWING = "Blues"


@styled
def node_matrix(
    values: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limits: tuple[float, float],
    row_label: str = "",
    column_label: str = "",
    label: str = "",
    title: str = "",
) -> Figure:
    """Draw a matrix with one named row per sender and one named column per receiver; NaN cells stay grey.

    Args:
        values: ``[row, column]``; NaN where the one cannot reach the other.
        rows, columns: names; of many, every second, third, ... is written.
        limits: the fixed range of the colours.
        row_label, column_label: what rows and columns are.
        label: what the colours measure.
        title: above the axes.

    Raises:
        DataError: the numbers of names differ from the shape of the values.
    """
    table = np.asarray(values, dtype=float)
    if table.shape != (len(rows), len(columns)):
        raise DataError(
            f"{len(rows)} rows and {len(columns)} columns are named, but the values have the shape "
            f"{table.shape}."
        )
    longest = max(len(name) for name in rows)
    high, wide = (_extent(n) for n in table.shape)
    figure = new_figure(1.3 + 0.07 * longest + wide, 1.1 + 0.05 * max(map(len, columns)) + high)
    axes = figure.add_subplot()
    # Values of both signs part in the middle; shares from 0 to 1 only grow.
    map_name = COOLWARM if limits[0] < 0 else _GROWING
    colours = matplotlib.colormaps[map_name].with_extremes(bad="#f4f5f7")
    image = axes.imshow(
        np.ma.masked_invalid(table), cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto"
    )
    _name(axes, rows, columns)
    axes.set_xlabel(column_label)
    axes.set_ylabel(row_label)
    axes.set_title(title)
    if max(table.shape) <= 2 * _MOST_LABELS:
        axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    colour_bar(axes, image, label=label, limits=limits)
    return figure


def _extent(n: int) -> float:
    """Inches for n cells: roomy for few, at most nine."""
    return min(max(0.155 * n, 1.2), 9.0)


def _name(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    for names, axis in ((rows, axes.yaxis), (columns, axes.xaxis)):
        step = -(-len(names) // _MOST_LABELS) if len(names) > 2 * _MOST_LABELS else 1
        axis.set_ticks(range(0, len(names), step), list(names)[::step], fontsize=6.5)
    for text in axes.get_xticklabels():
        text.set(rotation=90, color=MUTED)
    for text in axes.get_yticklabels():
        text.set_color(MUTED)
