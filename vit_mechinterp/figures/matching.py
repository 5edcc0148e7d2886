"""Figures of equivalence structures: matched images, the way down, spectra, and walks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures.style import PALETTE, new_figure, styled

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from jaxtyping import Float
    from PIL.Image import Image

__all__ = ["by_site", "drift_along", "matched_pairs", "matching_trajectories", "spectra"]


@styled
def matched_pairs(rows: Sequence[tuple[Sequence[Image], str]], headings: Sequence[str]) -> Figure:
    """Draw one row of images per pair, with a caption under its last one.

    Args:
        rows: images of every pair, and its caption.
        headings: above the columns.

    Raises:
        DataError: there is no pair.
    """
    if not rows:
        raise DataError("There is no pair of images to draw.")
    figure = new_figure(1.75 * len(headings) + 0.1, 2.0 * len(rows) + 0.25)
    panels: Any = figure.subplots(len(rows), len(headings), squeeze=False)
    for index, (images, caption) in enumerate(rows):
        for column, image in enumerate(images):
            axes = panels[index][column]
            axes.imshow(image, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if index == 0:
                axes.set_title(headings[column], fontsize=9)
        panels[index][-2].set_xlabel(caption, fontsize=8.5, labelpad=4)
    return figure


@styled
def matching_trajectories(table: pd.DataFrame) -> Figure:
    """Draw squared distance (as a share of each pair's first) and cosine over steps, a line per pair."""
    figure = new_figure(8.0, 3.2)
    left, right = figure.subplots(1, 2)
    for number, (_, own) in enumerate(table.groupby("pair")):
        color = PALETTE[number % len(PALETTE)]
        first = max(float(own["squared_distance"].iloc[0]), 1e-30)
        style: dict[str, Any] = {"color": color, "linewidth": 1.4, "alpha": 0.8}
        left.plot(own["step"], own["squared_distance"] / first, **style)
        right.plot(own["step"], own["cosine"], **style)
        for axes, value in (
            (left, own["squared_distance"].iloc[-1] / first),
            (right, own["cosine"].iloc[-1]),
        ):
            axes.plot(own["step"].iloc[-1], value, "o", color=color, markersize=3.5)
    left.set_yscale("log")
    left.set_ylabel("squared distance, share of the first")
    right.set_ylabel("cosine to the target's embedding")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(axis="y")
    return figure


@styled
def spectra(values: Mapping[str, Float[np.ndarray, "image value"]]) -> Figure:
    """Draw singular values in falling order, a panel per site and a line per image."""
    figure = new_figure((3.6 if len(values) < 3 else 2.4) * len(values) + 0.4, 3.0)
    panels: Any = figure.subplots(1, len(values), squeeze=False, sharey=True)
    for axes, (site, rows) in zip(panels[0], values.items(), strict=True):
        for row in rows:
            axes.plot(range(1, len(row) + 1), row, color=PALETTE[0], linewidth=1.2, alpha=0.55, marker=".")
        axes.set_yscale("log")
        axes.set_title(_short(site))
        axes.set_xlabel("singular value")
        axes.grid(axis="y")
    panels[0][0].set_ylabel("embedding units per input unit")
    return figure


def _short(site: str) -> str:
    """A residual stream is named by its block alone."""
    return site.replace("blocks.", "block ").replace(".resid_post", "")


@styled
def by_site(
    lines: Mapping[str, Sequence[tuple[float, float, float]]], sites: Sequence[str], *, label: str
) -> Figure:
    """Draw (value, lower end, upper end) at every site, a line per kind, on a logarithmic axis."""
    figure = new_figure(3.0 + 0.85 * max(len(sites), 4), 3.4)
    axes = figure.add_subplot()
    ends = []
    places = range(len(sites))
    for (name, values), color in zip(lines.items(), PALETTE, strict=False):
        middle, low, high = zip(*values, strict=True)
        axes.plot(places, middle, color=color, marker="o", markersize=4, zorder=3)
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0, zorder=2)
        ends.append((name, color, middle[-1]))
    axes.set_yscale("log")
    axes.set_xticks(places, [_short(site) for site in sites])
    axes.set_ylabel(label)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    for name, color, value in ends:
        axes.annotate(
            name, (len(sites) - 1, value), xytext=(9, 0), textcoords="offset points", va="center",
            color=color, fontsize=8.5, annotation_clip=False,
        )  # fmt: skip
    return figure


@styled
def drift_along(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]],
    *,
    label: str,
    value: str,
    logarithmic: bool = True,
) -> Figure:
    """Draw a quantity along walks, a line with its interval per kind.

    Args:
        curves: kind to (places, means, lower ends, upper ends).
        label: what the x axis measures.
        value: what the y axis measures.
        logarithmic: whether both axes are.
    """
    figure = new_figure(6.0, 3.4)
    axes = figure.add_subplot()
    for (name, (places, means, low, high)), color in zip(curves.items(), PALETTE, strict=False):
        axes.plot(places, means, color=color, label=name, marker="o", markersize=3.5)
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel(value)
    axes.grid()
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=min(len(curves), 4))
    return figure
