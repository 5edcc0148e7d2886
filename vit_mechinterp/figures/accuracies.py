"""Accuracies by condition and split: as the table of a paper, and as dots with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.dots import dots_by_row
from vit_mechinterp.figures.style import INK, MUTED, PALETTE, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_dots", "accuracy_table"]

Cells = Mapping[tuple[str, str], tuple[float, float, float, bool]]
"""(row, column) to value, ends of its interval, and whether that is at chance."""


@styled
def accuracy_table(
    cells: Cells, *, notes: Mapping[str, str] | None = None, notes_title: str = "", chance: float = 0.5
) -> Figure:
    """Draw accuracies as a table: colour from chance (white) to 1 (blue), grey where at chance.

    Args:
        cells: (row, column) to (value, lower end, upper end, at chance); a cell may be missing.
        notes: row to words beside its name; left out where all are alike.
        notes_title: heading of the notes.
        chance: the accuracy whose colour is white.

    Raises:
        DataError: there is no cell.
    """
    rows, columns = _names(cells)
    told = {} if notes is None or len(set(notes.values())) < 2 else notes
    first = 0.072 * max(len(row) for row in rows) + 0.2
    second = 0.072 * max(len(note) for note in (*told.values(), notes_title)) + 0.2 if told else 0.0
    width, height = 0.98, 0.42
    figure = new_figure(first + second + width * len(columns) + 0.2, height * len(rows) + 0.62)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, figure.get_figwidth())
    axes.set_ylim(figure.get_figheight(), 0)
    axes.set_axis_off()
    top = 0.5
    blues = matplotlib.colormaps["Blues"]
    for place, column in enumerate(columns):
        words = column.replace(" shape &", "\nshape &") if len(column) > 13 else column
        axes.text(first + second + width * (place + 0.5), top - 0.06, words, ha="center", va="bottom",
                  color=MUTED, fontsize=8.5)  # fmt: skip
    if told:
        axes.text(first, top - 0.06, notes_title, va="bottom", color=MUTED, fontsize=8.5)
    for line, row in enumerate(rows):
        middle = top + height * (line + 0.5)
        axes.text(0.1, middle, row, va="center")
        axes.text(first, middle, told.get(row, ""), va="center", color=MUTED, fontsize=8.5)
        for place, column in enumerate(columns):
            if (row, column) not in cells:
                continue
            value, low, high, at_chance = cells[row, column]
            share = float(np.clip((value - chance) / (1 - chance), 0, 1))
            color = "#e4e6ea" if at_chance else blues(0.72 * share)
            left = first + second + width * place
            axes.add_patch(
                matplotlib.patches.Rectangle((left + 0.02, middle - height / 2 + 0.02), width - 0.04,
                                             height - 0.04, color=color, linewidth=0)
            )  # fmt: skip
            ink = MUTED if at_chance else "white" if share > 0.8 else INK
            axes.text(left + width / 2, middle, f"{value:.3f}", ha="center", va="bottom", color=ink)
            words = f"{low:.3f}\N{EN DASH}{high:.3f}"
            axes.text(left + width / 2, middle + 0.03, words, ha="center", va="top", fontsize=6.8, color=ink)
    return figure


def accuracy_dots(cells: Cells, *, chance: float = 0.5) -> Figure:
    """Draw the same as dots with intervals: splits down, conditions in colours; or, of many conditions,
    conditions down and splits in colours.

    Only columns that every condition has are drawn.
    """
    rows, columns = _names(cells)
    columns = [column for column in columns if all((row, column) in cells for row in rows)]
    outer, inner = (rows, columns) if len(rows) <= len(PALETTE) else (columns[: len(PALETTE)], rows)
    by_condition = outer is rows
    groups = {
        one: {
            other: cells[(one, other) if by_condition else (other, one)][:3] for other in inner
        }
        for one in outer
    }
    lowest = min(low for group in groups.values() for _, low, _ in group.values())
    limits = (min(chance - 0.05, lowest - 0.02), 1.0)
    return dots_by_row(groups, label="accuracy", limits=limits, references={"chance": chance})


def _names(cells: Cells) -> tuple[list[str], list[str]]:
    if not cells:
        raise DataError("There is no accuracy to draw.")
    return list(dict.fromkeys(row for row, _ in cells)), list(dict.fromkeys(column for _, column in cells))
