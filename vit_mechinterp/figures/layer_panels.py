"""Several line charts over layers side by side, on one scale and with one legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.curves import Curve
from vit_mechinterp.figures.style import (
    COOLWARM,
    MUTED,
    PALETTE,
    layer_axis,
    new_figure,
    star_at_peak,
    styled,
)

__all__ = ["panels_by_layer"]


@styled
def panels_by_layer(
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    label: str = "",
    references: Mapping[str, float] | None = None,
    backdrop: Sequence[float] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    columns: int = 3,
) -> Figure:
    """Draw one chart per name: a line per name with its interval, layers along x; controls are dashed.

    Args:
        panels: title to lines; a line's ``x`` are its layers. A name has one colour in all charts.
        label: what the y axes measure.
        references: name to height of a dotted line in every chart (chance).
        backdrop: values in 0..1 ``[layer]`` that tint the background of every layer, blue to red (Lepori et
            al. 2024, Figs. 3 to 5).
        limits: range of the y axes.
        columns: most charts in a row.

    Raises:
        DataError: there is no line.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    if not names:
        raise DataError("There is no line to draw.")
    n_layers = 1 + int(max(max(line.x) for lines in panels.values() for line in lines.values()))
    n_layers = max(n_layers, len(backdrop or ()))
    colors = dict(zip(names, PALETTE * 4, strict=False))
    n_columns = min(columns, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = new_figure(1.9 + n_columns * (1.1 + 0.24 * max(n_layers, 8)), 0.4 + 2.75 * n_rows)
    grid = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False)
    every = list(grid.flat)
    for axes, (title, lines) in zip(every, panels.items(), strict=False):
        _draw(axes, lines, colors, references or {}, backdrop, limits)
        layer_axis(axes, n_layers)
        axes.set_title(title)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel(label)
    handles: dict[str, Artist] = {}
    for axes in every:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper")
    return figure


def _draw(
    axes: Axes,
    lines: Mapping[str, Curve],
    colors: Mapping[str, str],
    references: Mapping[str, float],
    backdrop: Sequence[float] | None,
    limits: tuple[float, float],
) -> None:
    tints = matplotlib.colormaps[COOLWARM]
    for layer, value in enumerate(backdrop or ()):
        axes.axvspan(layer - 0.5, layer + 0.5, color=tints(float(value)), alpha=0.28, linewidth=0, zorder=0)
    axes.set_ylim(*limits)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for name, line in lines.items():
        color = colors[name]
        look: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.7}
        if line.control:
            look = {"linestyle": (0, (4, 2)), "linewidth": 1.4, "alpha": 0.85}
        axes.plot(line.x, line.y, color=color, label=name, zorder=3, clip_on=False, **look)
        if len(line.low):
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.16, linewidth=0, zorder=2)
        if not line.control:
            values = [float("nan")] * (1 + int(max(line.x)))
            for place, value in zip(line.x, line.y, strict=True):
                values[int(place)] = value
            star_at_peak(axes, values, color)
    for name, height in references.items():
        axes.axhline(height, color=MUTED, linewidth=1.1, linestyle=(0, (1, 1.6)), zorder=1, label=name)
