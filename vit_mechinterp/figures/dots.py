"""Dot charts: a value with its interval per row and group, and what every run does to every example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import INK, MUTED, PALETTE, new_figure, styled

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["dots_by_row", "examples_by_run"]

Interval = tuple[float, float, float]


@styled
def dots_by_row(
    groups: Mapping[str, Mapping[str, Interval]],
    *,
    title: str = "",
    label: str = "",
    limits: tuple[float, float] | None = (0.0, 1.0),
    references: Mapping[str, float] | None = None,
    logarithmic: bool = False,
) -> Figure:
    """Draw one row per name and in it one dot per group, with its interval.

    Args:
        groups: group to row to (value, lower end, upper end); the rows of the first group give the order.
        title: above the axes.
        label: what the x axis measures.
        limits: the fixed range of the x axis; None fits it to the data.
        logarithmic: whether the x axis is; its range fits the data.
        references: name to value, drawn as vertical dotted lines (chance).

    Raises:
        DataError: there is nothing to draw, or the groups have different rows.
    """
    rows = list(next(iter(groups.values()), {}))
    if not rows or any(set(group) != set(rows) for group in groups.values()):
        raise DataError(
            "Every group needs a value for the same rows, and at least one; got "
            + "; ".join(f"{name}: {', '.join(group)}" for name, group in groups.items())
        )
    height = 0.16 * len(groups) + 0.24
    figure = new_figure(6.4, 1.05 + height * len(rows))
    axes = figure.add_subplot()
    offsets = (np.arange(len(groups)) - (len(groups) - 1) / 2) * 0.5 / max(len(groups), 1)
    for offset, group, color in zip(offsets, groups.values(), PALETTE, strict=False):
        for place, row in enumerate(rows):
            value, low, high = group[row]
            axes.plot([low, high], [place + offset] * 2, color=color, linewidth=2.4, alpha=0.35, zorder=2)
            axes.plot(value, place + offset, marker="o", markersize=6.5, color=color, zorder=3, clip_on=False)
            axes.annotate(
                f"{value:.2g}" if logarithmic else f"{value:.2f}",
                (high, place + offset),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=color,
                annotation_clip=False,
            )
    for name, value in (references or {}).items():
        axes.axvline(value, color=MUTED, linewidth=1.1, linestyle=(0, (1, 1.6)), zorder=1)
        axes.annotate(
            name, (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
            ha="center", color=MUTED, fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if logarithmic:
        axes.set_xscale("log")
        axes.margins(x=0.12)
    elif limits is not None:
        axes.set_xlim(*limits)
    axes.set_xlabel(label)
    axes.set_title(title)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    handles = [
        Line2D([], [], color=color, marker="o", linewidth=2.4)
        for _, color in zip(groups, PALETTE, strict=False)
    ]
    if len(groups) > 1:
        figure.legend(handles, list(groups), loc="outside lower center", ncols=len(groups))
    return figure


@styled
def examples_by_run(
    values: Float[np.ndarray, "run example"],
    runs: Sequence[str],
    *,
    examples: Sequence[str] | None = None,
    title: str = "",
    label: str = "",
    ends: tuple[str, str] | None = None,
    zero: str = "",
) -> Figure:
    """Draw one column of dots per run, a dot per example joined by a thin line, and the mean of every run.

    Args:
        values: ``[run, example]``.
        runs: names of the columns.
        examples: a short name per example, written beside its last dot.
        title: above the axes.
        label: what the y axis measures.
        ends: what values below and above zero mean, in words.
        zero: what the line at zero is.

    Raises:
        DataError: the number of names differs from the number of values.
    """
    array = np.asarray(values, dtype=float)
    names = [str(i + 1) for i in range(array.shape[-1])] if examples is None else list(examples)
    if array.shape != (len(runs), len(names)):
        raise DataError(
            f"{len(runs)} runs and {len(names)} examples are named, but the values have the shape "
            f"{array.shape}."
        )
    figure = new_figure(2.2 + 1.05 * len(runs), 3.6)
    axes = figure.add_subplot()
    axes.axhline(0, color=MUTED, linewidth=1.1, linestyle=(0, (1, 1.6)), zorder=1)
    places = np.arange(len(runs))
    # Examples lie side by side within a column, so that dots of near values stay apart.
    shifts = (np.arange(len(names)) - (len(names) - 1) / 2) * min(0.05, 0.5 / len(names))
    for line, shift in zip(array.T, shifts, strict=True):
        axes.plot(places + shift, line, color="#dde1e7", linewidth=0.8, zorder=2)
        colors = [PALETTE[1] if value > 0 else PALETTE[0] for value in line]
        axes.scatter(places + shift, line, s=20, c=colors, zorder=3, linewidths=0)
    for place, mean in zip(places, array.mean(axis=1), strict=True):
        axes.plot([place - 0.3, place + 0.3], [mean, mean], color=INK, linewidth=2.2, zorder=4)
        axes.annotate(
            f"{mean:+.1f}".replace("-", "−"), (place + 0.33, mean), va="center", fontsize=8.5, zorder=4
        )
    bound = float(np.abs(array).max()) * 1.12
    axes.set_ylim(-bound, bound)
    axes.set_xlim(-0.5, len(runs) - 0.35)
    axes.set_xticks(places, runs)
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for words, y, color in zip(ends or (), (0.02, 0.98), PALETTE, strict=False):
        axes.annotate(
            words, (1.0, y), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
            va="bottom" if y < 0.5 else "top", color=color, fontsize=8.5,
        )  # fmt: skip
    if zero:
        axes.annotate(
            zero, (1.0, 0.0), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", color=MUTED, fontsize=8.5,
        )  # fmt: skip
    return figure
