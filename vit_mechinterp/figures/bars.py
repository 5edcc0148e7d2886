"""Bars that stand on each other: how a sum builds up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import INK, MUTED, PALETTE, new_figure, styled

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["build_up"]


@styled
def build_up(
    names: Sequence[str],
    groups: Sequence[str],
    values: Float[np.ndarray, " part"],
    *,
    label: str = "",
    title: str = "",
) -> Figure:
    """Draw one bar per part, each beginning where the one before it ended, and the sum at the end.

    Args:
        names: names of the parts, in order.
        groups: group of each part; one colour each.
        values: signed sizes of the parts.
        label: what the y axis measures.
        title: above the axes.

    Raises:
        DataError: there is no part, or names, groups and values differ in number.
    """
    array = np.asarray(values, dtype=float)
    if len(array) == 0 or not len(array) == len(names) == len(groups):
        raise DataError(f"{len(names)} names and {len(groups)} groups are given for {len(array)} parts.")
    ends = np.cumsum(array)
    starts = ends - array
    n = len(array)
    figure = new_figure(1.6 + 0.24 * max(n, 12), 3.3)
    axes = figure.add_subplot()
    colours = dict(zip(dict.fromkeys(groups), PALETTE * 4, strict=False))
    axes.bar(range(n), array, bottom=starts, color=[colours[group] for group in groups], width=0.78, zorder=3)
    for place in range(n - 1):
        axes.plot([place - 0.39, place + 1.39], [ends[place]] * 2, color="#b9bec7", linewidth=0.8, zorder=2)
    axes.bar(n, ends[-1], color=INK, width=0.78, zorder=3)
    axes.annotate(
        f"{ends[-1]:.3g}", (n, ends[-1]), xytext=(0, 4 if ends[-1] >= 0 else -4), textcoords="offset points",
        ha="center", va="bottom" if ends[-1] >= 0 else "top", fontsize=8.5,
    )  # fmt: skip
    axes.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
    axes.set_xticks(range(n + 1), [*names, "sum"], rotation=90, fontsize=8)
    axes.set_xlim(-0.7, n + 0.7)
    axes.margins(y=0.12)
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    handles = [Patch(color=colour, label=group) for group, colour in colours.items()]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), handlelength=0.9, columnspacing=1.4
    )
    return figure
