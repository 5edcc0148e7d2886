"""Figures of spatial structure: phases of learning, matrices between patches, similarity maps, transfer
curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.curves import Curve
from vit_mechinterp.figures.style import COOLWARM, MUTED, PALETTE, label_line_ends, new_figure, styled

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["learning_phases", "patch_matrices", "similarity_maps", "transfer_curves"]

_MOST_MAPS = 8


@styled
def learning_phases(
    steps: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    phases: Sequence[tuple[str, float]] = (),
    label: str = "",
) -> Figure:
    """Draw quantities over training, on ground that is tinted by phase.

    Args:
        steps: where the lines have their values.
        lines: name to values.
        phases: name of every phase and the step at which it ends, in order.
        label: what the y axis measures.

    Raises:
        DataError: a line has another length than the steps.
    """
    for name, values in lines.items():
        if len(values) != len(steps):
            raise DataError(f"The line {name!r} has {len(values)} values for {len(steps)} steps.")
    figure = new_figure(7.4, 3.6)
    axes = figure.add_subplot()
    # Much happens in few steps at first: linear up to a few steps, logarithmic from there on.
    axes.set_xscale("symlog", linthresh=10, linscale=0.7)
    tints = ("#e9ecf1", "#fdf3e3", "#e6f4ee")
    start = float(steps[0])
    for number, (name, end) in enumerate(phases):
        color = tints[number % len(tints)]
        axes.axvspan(start, end, color=color, linewidth=0, zorder=0, label=name)
        start = end
    ends = []
    for (name, values), color in zip(lines.items(), PALETTE, strict=False):
        axes.plot(steps, values, color=color, zorder=3)
        ends.append((name, float(values[-1]), color))
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(-0.04, 1.06)
    ticks = [tick for tick in (0, 5, 10, 30, 100, 300, 1000, 3000) if steps[0] <= tick <= steps[-1]]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("step of gradient descent")
    if phases:
        figure.legend(loc="outside upper left", ncols=len(phases), handlelength=1.2, handleheight=1.0)
    axes.set_ylabel(label)
    axes.set_axisbelow(True)
    label_line_ends(axes, ends)
    return figure


@styled
def patch_matrices(
    matrices: Mapping[str, Float[np.ndarray, "row column"]],
    *,
    seams: Sequence[int] = (),
    label: str = "",
    limit: float | None = None,
) -> Figure:
    """Draw matrices between patches side by side, on one scale from 0, with seams between sets.

    Args:
        matrices: title to ``[patch, patch]``.
        seams: rows (and columns) before which a line is drawn.
        label: what the colours measure.
        limit: upper end of the colours; by default the largest value of all.
    """
    if not matrices:
        raise DataError("There is no matrix to draw.")
    per_row = min(len(matrices), 4)
    rows = math.ceil(len(matrices) / per_row)
    figure = new_figure(2.35 * per_row + 0.8, 2.55 * rows)
    panels: Any = figure.subplots(rows, per_row, squeeze=False)
    top = limit or max(float(np.nanmax(values)) for values in matrices.values())
    image = None
    for axes, (title, values) in zip(panels.flat, matrices.items(), strict=False):
        image = axes.imshow(values, cmap="magma_r", vmin=0, vmax=top, interpolation="nearest")
        for seam in seams:
            axes.axhline(seam - 0.5, color="#b9bec7", linewidth=0.5)
            axes.axvline(seam - 0.5, color="#b9bec7", linewidth=0.5)
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("attended patch", color=MUTED, fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("attending patch", color=MUTED, fontsize=8)
    for axes in list(panels.flat)[len(matrices) :]:
        axes.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.015, aspect=18)
    bar.outline.set_visible(False)
    bar.set_label(label)
    bar.ax.tick_params(length=0)
    return figure


@styled
def similarity_maps(
    similarity: Float[np.ndarray, "patch patch"],
    grid: tuple[int, int],
    *,
    threshold: float = 0.55,
    label: str = "similarity",
) -> Figure:
    """Draw for every patch (every second, third, ... of a large grid) a map of its similarities.

    Maps lie where their patches lie; a dot marks the patch itself. On the left values from -1 to 1, on the
    right which of them pass the threshold.
    """
    height, width = grid
    if similarity.shape != (height * width, height * width):
        raise DataError(f"A grid of {height} x {width} patches does not fit similarities {similarity.shape}.")
    rows, columns = (np.arange(0, n, -(-n // _MOST_MAPS)) for n in grid)
    figure = new_figure(9.2, 4.5 * len(rows) / len(columns) + 0.35)
    halves: Any = figure.subplots(1, 2)
    thresholded = np.where(similarity > threshold, 1.0, np.nan)
    colours = matplotlib.colormaps[COOLWARM]
    for axes, values, title in (
        (halves[0], similarity, "similarity of positional encodings"),
        (halves[1], thresholded, f"above {threshold:g}"),
    ):
        maps = values.reshape(height, width, height, width)[np.ix_(rows, columns)]
        gap = 1
        sheet = np.full((len(rows) * (height + gap) - gap, len(columns) * (width + gap) - gap), np.nan)
        ground = np.zeros_like(sheet)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                top, left = i * (height + gap), j * (width + gap)
                sheet[top : top + height, left : left + width] = maps[i, j]
                ground[top : top + height, left : left + width] = 1
                axes.plot(left + column, top + row, "o", color="white", markersize=1.6, zorder=3)
        axes.imshow(np.where(ground > 0, 0.95, 1.0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        image = axes.imshow(sheet, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    bar = figure.colorbar(image, ax=list(halves), fraction=0.025, pad=0.015, aspect=18)
    bar.outline.set_visible(False)
    bar.set_label(label)
    bar.set_ticks([-1, 0, 1])
    bar.ax.tick_params(length=0)
    return figure


@styled
def transfer_curves(
    lines: Mapping[str, Curve], *, label: str = "test accuracy", chance: float = 0.5
) -> Figure:
    """Draw a quantity against the number of training examples, on a logarithmic axis, with intervals."""
    if not lines:
        raise DataError("There is no curve to draw.")
    figure = new_figure(7.0, 3.6)
    axes = figure.add_subplot()
    ends = []
    for (name, line), color in zip(lines.items(), PALETTE, strict=False):
        axes.plot(line.x, line.y, color=color, marker="o", markersize=4, zorder=3)
        if len(line.low):
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.15, linewidth=0, zorder=2)
        ends.append((name, line.y[-1], color))
    axes.axhline(chance, color=MUTED, linewidth=1.1, linestyle=(0, (1, 1.6)), zorder=1)
    places = sorted({x for line in lines.values() for x in line.x})
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{x:g}" for x in places])
    axes.minorticks_off()
    axes.set_xlim(places[0], places[-1])
    axes.set_xlabel("examples of the new task")
    axes.set_ylabel(label)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    label_line_ends(axes, [*ends, ("chance", chance, MUTED)])
    return figure
