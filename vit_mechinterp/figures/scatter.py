"""An approximation against what it approximates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import INK, MUTED, PALETTE, new_figure, styled

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["predicted_against_exact"]


@styled
def predicted_against_exact(
    groups: Mapping[str, tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]],
    *,
    label: str = "",
    axes_labels: tuple[str, str] = ("exact", "predicted"),
    note: str = "",
) -> Figure:
    """Draw one dot per cell, exact along x and predicted along y, with the line where both agree.

    Args:
        groups: name to (predicted, exact); one colour each.
        label: what both measure, above the axes.
        axes_labels: names of the x and the y axis.
        note: a few words in the corner, such as the correlation.

    Raises:
        DataError: there is nothing to draw.
    """
    every = [np.concatenate(pair) for pair in groups.values()]
    if not every or not sum(map(len, every)):
        raise DataError("There is no cell that was both predicted and measured.")
    seen = np.concatenate([*every, [0.0]])
    low, high = float(np.nanmin(seen)), float(np.nanmax(seen))
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin
    figure = new_figure(5.4, 3.9)
    axes = figure.add_subplot()
    axes.axhline(0, color="#e8eaee", linewidth=0.8, zorder=1)
    axes.axvline(0, color="#e8eaee", linewidth=0.8, zorder=1)
    axes.plot([low, high], [low, high], color=MUTED, linewidth=1.1, linestyle=(0, (1, 1.6)), zorder=2)
    for (name, (predicted, exact)), color in zip(groups.items(), PALETTE * 4, strict=False):
        axes.scatter(exact, predicted, s=20, color=color, alpha=0.75, linewidths=0, label=name, zorder=3)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_box_aspect(1)
    axes.locator_params(nbins=6)
    axes.set_xlabel(axes_labels[0])
    axes.set_ylabel(axes_labels[1])
    axes.set_title(label)
    axes.annotate(note, (0.03, 0.97), xycoords="axes fraction", va="top", color=INK, fontsize=8.5)
    if len(groups) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", handletextpad=0.2)
    return figure
