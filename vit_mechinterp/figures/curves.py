"""Curves over a count: what is left as more and more is taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import MUTED, PALETTE, label_line_ends, new_figure, styled

__all__ = ["Curve", "curves"]


@dataclass(frozen=True)
class Curve:
    """One line: its points, the interval around each if there is one, and whether it is a control."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    control: bool = False


@styled
def curves(
    lines: Mapping[str, Curve],
    *,
    x_label: str = "",
    label: str = "",
    title: str = "",
    references: Mapping[str, float] | None = None,
) -> Figure:
    """Draw one line per name with its interval; controls are grey.

    Args:
        lines: name to curve. Controls of one name prefix (``"random 1"``, ``"random 2"``) are named once.
        x_label, label: what the axes measure.
        title: above the axes.
        references: name to height of a dotted line.

    Raises:
        DataError: there is no line, or a line's lengths differ.
    """
    if not lines:
        raise DataError("There is no curve to draw.")
    for name, line in lines.items():
        if (
            len(line.x) != len(line.y)
            or len(line.low) != len(line.high)
            or len(line.low) not in (0, len(line.x))
        ):
            raise DataError(f"The curve {name!r} has {len(line.x)} places and {len(line.y)} heights.")
    figure = new_figure(6.2, 3.4)
    axes = figure.add_subplot()
    ends: list[tuple[str, float, str]] = []
    colors = iter(PALETTE * 4)
    named = False
    for name, line in lines.items():
        color = "#b9bec7" if line.control else next(colors)
        look: dict[str, Any] = {"marker": "o", "zorder": 3}
        if line.control:
            look = {"linewidth": 1.1, "zorder": 2}
        axes.plot(line.x, line.y, color=color, markersize=3.5, **look)
        if len(line.low) and not line.control:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.16, linewidth=0, zorder=2)
        if not line.control:
            ends.append((name, line.y[-1], color))
        elif not named:
            ends.append((name.rstrip(" 0123456789"), line.y[-1], MUTED))
            named = True
    for name, height in (references or {}).items():
        axes.axhline(height, color=MUTED, linewidth=1.1, linestyle=(0, (1, 1.6)), zorder=1)
        ends.append((name, height, MUTED))
    first, last = (end(end(line.x) for line in lines.values()) for end in (min, max))
    if first == last:
        # One place alone: a dot in the middle, with its interval as a bar.
        first, last = first - 1, last + 1
        axes.set_xticks([(first + last) / 2])
        shown = [line for line in lines.values() if not line.control]
        for line, color in zip(shown, PALETTE * 4, strict=False):
            axes.vlines(line.x, line.low, line.high, color=color, linewidth=1.6, zorder=2)
    elif all(float(place).is_integer() for line in lines.values() for place in line.x):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(first, last)
    axes.set_xlabel(x_label)
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    label_line_ends(axes, _apart(ends))
    return figure


def _apart(ends: Sequence[tuple[str, float, str]]) -> list[tuple[str, float, str]]:
    """Name curves that end in one point in one line, so that the names do not push each other away."""
    merged: list[tuple[str, float, str]] = []
    for name, y, color in ends:
        same = next((i for i, (_, other, own) in enumerate(merged) if other == y and own == color), None)
        if same is None:
            merged.append((name, y, color))
        else:
            merged[same] = (f"{merged[same][0]}, {name}", y, color)
    return merged
