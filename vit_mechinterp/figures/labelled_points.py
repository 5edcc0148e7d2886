"""Scatter plots of a few named things, in panels on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import INK, PALETTE, new_figure, styled

__all__ = ["Points", "labelled_points"]

_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Points:
    """Named points, the intervals of each one's height and place across if there are any, and a few words."""

    names: Sequence[str]
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    note: str = ""
    left: Sequence[float] = ()
    right: Sequence[float] = ()


@styled
def labelled_points(
    panels: Mapping[str, Points], *, x_label: str = "", y_label: str = "", columns: int = 3
) -> Figure:
    """Draw one panel per name; a point's name has one colour and marker in all of them, said in the legend.

    Raises:
        DataError: there is nothing to draw.
    """
    names = list(dict.fromkeys(name for points in panels.values() for name in points.names))
    if not names:
        raise DataError("There is no point to draw.")
    look = {
        name: (color, marker)
        for name, color, marker in zip(names, PALETTE * 9, _MARKERS * 9, strict=False)
    }
    n_columns = min(columns, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = new_figure(1.7 + 2.75 * n_columns, 0.3 + 2.9 * n_rows)
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    heights = [y for points in panels.values() for y in (*points.y, *points.low, *points.high)]
    across = [x for points in panels.values() for x in (*points.x, *points.left, *points.right)]
    for axes, (title, points) in zip(grid.flat, panels.items(), strict=False):
        axes.grid()
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        for place, name in enumerate(points.names):
            color, marker = look[name]
            x, y = points.x[place], points.y[place]
            if len(points.low):
                ends = [points.low[place], points.high[place]]
                axes.plot([x, x], ends, color=color, linewidth=1.2, alpha=0.6)
            if len(points.left):
                ends = [points.left[place], points.right[place]]
                axes.plot(ends, [y, y], color=color, linewidth=1.2, alpha=0.6)
            axes.plot(x, y, marker=marker, color=color, linestyle="none", markersize=7, label=name)
        axes.set_title(title, fontsize=9)
        axes.annotate(points.note, (0.03, 0.03), xycoords="axes fraction", va="bottom", color=INK, fontsize=8)
        axes.set_xlabel(x_label)
    low, high = min(heights), max(heights)
    room = 0.06 * (high - low) or 0.05
    grid[0][0].set_ylim(low - 5 * room, high + room)  # words stand below the points
    left, right = min(across), max(across)
    room = 0.08 * (right - left) or 0.05
    grid[0][0].set_xlim(left - room, right + room)
    for row in grid:
        row[0].set_ylabel(y_label)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    handles: dict[str, Artist] = {}
    for axes in grid.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(name), handle)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper")
    return figure
