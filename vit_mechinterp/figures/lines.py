"""Line charts over layers, with a star at each peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.heatmaps import colour_bar, draw_heat
from vit_mechinterp.figures.style import (
    COOLWARM,
    MUTED,
    PALETTE,
    label_line_ends,
    layer_axis,
    new_figure,
    star_at_peak,
    styled,
)

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["das_by_layer", "lines_by_layer", "stages_over_layers"]


@styled
def lines_by_layer(
    lines: Mapping[str, Sequence[float]],
    *,
    title: str = "",
    label: str = "",
    limits: tuple[float, float] | None = (0.0, 1.0),
    references: Mapping[str, float] | None = None,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    backdrop: Sequence[float] | None = None,
    first_peak_layer: int = 0,
) -> Figure:
    """Draw one line per name, its value at every layer, and a star at its peak.

    Args:
        lines: name to values ``[layer]``; all of one length.
        title: above the axes.
        label: what the y axis measures.
        limits: fixed range of the y axis; None fits it to the data.
        references: name to value, drawn as horizontal dotted lines (chance, no effect).
        bands: name of a line to the lower and upper ends ``[layer]`` of its interval, drawn as a tint.
        backdrop: values in 0..1 ``[layer]`` that tint the background of every layer, blue to red
            (paper A, Figs. 3 to 5).
        first_peak_layer: stars look for the peak from this layer on.

    Raises:
        DataError: there is no line, or the lengths differ, or a band belongs to no line.
    """
    n_layers = _common_length(lines)
    _check_bands(lines, bands or {})
    figure = new_figure(2.6 + 0.38 * max(n_layers, 8), 3.2)
    axes = figure.add_subplot()
    _tint(axes, backdrop)
    _draw_lines(axes, lines, limits, references or {}, first_peak_layer)
    _draw_bands(axes, lines, bands or {})
    layer_axis(axes, n_layers)
    axes.set_ylabel(label)
    axes.set_title(title)
    return figure


@styled
def stages_over_layers(
    heat: Float[np.ndarray, "layer head"],
    lines: Mapping[str, Sequence[float]],
    *,
    title: str = "",
    heat_label: str = "global score",
    line_label: str = "max. attention over heads",
    limits: tuple[float, float] = (0.0, 1.0),
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    first_peak_layer: int = 0,
) -> Figure:
    """Draw the heat map of heads over the line chart of attention kinds, on one layer axis (paper A, Fig. 2).

    Args:
        heat: ``[layer, head]``, 0 (local, blue) to 1 (global, red).
        lines: kind of attention to values ``[layer]``.
        title: above both.
        heat_label: what the colours measure.
        line_label: what the lines measure.
        limits: fixed range of the lines' axis.
        bands: name of a line to the lower and upper ends ``[layer]`` of its interval, drawn as a tint.
        first_peak_layer: stars look for the peak from this layer on.

    Raises:
        DataError: the heat map and the lines differ in their number of layers, or a band belongs to no line.
    """
    table = np.asarray(heat, dtype=float).T
    n_heads, n_layers = table.shape
    if _common_length(lines) != n_layers:
        raise DataError(f"The heat map has {n_layers} layers, the lines have {_common_length(lines)}.")
    _check_bands(lines, bands or {})
    heat_height = 0.7 + 0.26 * max(n_heads, 4)
    figure = new_figure(2.9 + 0.42 * max(n_layers, 8), heat_height + 2.9)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[heat_height, 2.6])
    image = draw_heat(above, table, limits=(0.0, 1.0), numbers=n_heads <= 6)
    above.set_ylabel("head")
    above.set_yticks(range(0, n_heads, 1 if n_heads <= 8 else 2))
    above.set_xlabel("")
    above.set_title(title)
    colour_bar(above, image, label=heat_label, ends=("local", "global"))
    _draw_lines(below, lines, limits, {}, first_peak_layer)
    _draw_bands(below, lines, bands or {})
    layer_axis(below, n_layers)
    below.set_ylabel(line_label)
    return figure


@styled
def das_by_layer(
    accuracy: Mapping[str, Sequence[float]],
    *,
    controls: Mapping[str, Sequence[float]] | None = None,
    control_name: str = "wrong object",
    chance: float = 0.5,
    no_effect: float | Mapping[str, float] | None = None,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    backdrop: Sequence[float] | None = None,
    title: str = "",
    label: str = "interchange accuracy",
) -> Figure:
    """Draw the interchange accuracy of DAS by layer, with its controls (paper A, Fig. 3b).

    Args:
        accuracy: attribute ("shape", "colour") to held-out accuracy ``[layer]``.
        controls: attribute to the accuracy ``[layer]`` of its control, in the same colour, dashed.
        control_name: what the control is called in the labels.
        chance: accuracy of guessing.
        no_effect: accuracy if the intervention changed nothing, about one minus the base accuracy; one value
            for all, or attribute to its own, drawn in its colour where they differ.
        bands: attribute to the lower and upper ends ``[layer]`` of its intervals, drawn as a tint.
        backdrop: values in 0..1 ``[layer]`` that tint the background of every layer.
        title: above the axes.
        label: what the y axis measures.

    Raises:
        DataError: the lengths differ, or a control has no attribute to belong to.
    """
    controls = controls or {}
    own = set(controls) | set(bands or ()) | (set(no_effect) if isinstance(no_effect, Mapping) else set())
    if orphans := sorted(own - set(accuracy)):
        raise DataError(f"There are controls for {orphans}, but accuracies only for {sorted(accuracy)}.")
    n_layers = _common_length({**accuracy, **{f"{name} control": line for name, line in controls.items()}})
    figure = new_figure(3.2 + 0.38 * max(n_layers, 8), 3.4)
    axes = figure.add_subplot()
    _tint(axes, backdrop)
    axes.set_ylim(0.0, 1.0)
    _frame(axes)
    ends: list[tuple[str, float, str]] = []
    for (name, line), color in zip(accuracy.items(), PALETTE, strict=False):
        axes.plot(line, marker="o", color=color, zorder=3)
        if bands and name in bands:
            axes.fill_between(range(n_layers), *bands[name], color=color, alpha=0.16, linewidth=0, zorder=2)
        star_at_peak(axes, line, color)
        ends.append((name, float(line[-1]), color))
        if name in controls:
            axes.plot(controls[name], color=color, linestyle=(0, (4, 2)), linewidth=1.4, alpha=0.75, zorder=2)
            ends.append((f"{name}, {control_name}", float(controls[name][-1]), color))
    ends += _draw_references(axes, {"chance": chance})
    if isinstance(no_effect, Mapping):
        own_lines = [
            _draw_references(axes, {f"{name}, no effect": value}, color)[0]
            for (name, value), color in zip(no_effect.items(), PALETTE, strict=False)
        ]
        heights = [value for _, value, _ in own_lines]
        # Lines that cannot be told apart share a label.
        near = max(heights) - min(heights) < 0.03
        ends += [("no effect", min(heights), MUTED)] if near else own_lines
    elif no_effect is not None:
        ends += _draw_references(axes, {"no effect": no_effect})
    layer_axis(axes, n_layers)
    axes.set_ylabel(label)
    axes.set_title(title)
    label_line_ends(axes, ends)
    return figure


def _draw_lines(
    axes: Axes,
    lines: Mapping[str, Sequence[float]],
    limits: tuple[float, float] | None,
    references: Mapping[str, float],
    first_peak_layer: int,
) -> None:
    if limits is not None:
        axes.set_ylim(*limits)
    _frame(axes)
    ends: list[tuple[str, float, str]] = []
    for index, (name, line) in enumerate(lines.items()):
        color = PALETTE[index % len(PALETTE)]
        axes.plot(line, marker="o", color=color, zorder=3)
        star_at_peak(axes, line, color, first_peak_layer)
        ends.append((name, float(line[-1]), color))
    ends += _draw_references(axes, references)
    label_line_ends(axes, ends)


def _check_bands(
    lines: Mapping[str, Sequence[float]], bands: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> None:
    for name, (low, high) in bands.items():
        if name not in lines:
            raise DataError(f"There is a band for {name!r}, but lines only for {', '.join(lines)}.")
        _common_length({name: lines[name], f"{name}, low": low, f"{name}, high": high})


def _draw_bands(
    axes: Axes,
    lines: Mapping[str, Sequence[float]],
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> None:
    for index, (name, line) in enumerate(lines.items()):
        if name in bands:
            color = PALETTE[index % len(PALETTE)]
            axes.fill_between(range(len(line)), *bands[name], color=color, alpha=0.16, linewidth=0, zorder=2)


def _draw_references(
    axes: Axes, references: Mapping[str, float], color: str = MUTED
) -> list[tuple[str, float, str]]:
    for value in references.values():
        axes.axhline(value, color=color, linewidth=1.1, linestyle=(0, (1, 1.6)), zorder=1)
    return [(name, value, color) for name, value in references.items()]


def _frame(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _tint(axes: Axes, backdrop: Sequence[float] | None) -> None:
    colours = matplotlib.colormaps[COOLWARM]
    for layer, value in enumerate(backdrop if backdrop is not None else ()):
        axes.axvspan(layer - 0.5, layer + 0.5, color=colours(float(value)), alpha=0.28, linewidth=0, zorder=0)


def _common_length(lines: Mapping[str, Sequence[float]]) -> int:
    lengths = {name: len(line) for name, line in lines.items()}
    if not lengths or len(set(lengths.values())) > 1:
        raise DataError(f"Lines over layers need one value per layer each; their lengths are {lengths}.")
    return next(iter(lengths.values()))
