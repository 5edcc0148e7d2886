"""One look for every figure: fonts, colours, sizes, and how a figure becomes a file.

Figures are made with the Agg canvas and never touch pyplot, so drawing needs no display and leaves no state.
Colours are those of Okabe and Ito (2008), which stay apart under every common colour-vision deficiency.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = [
    "COOLWARM",
    "DPI",
    "INK",
    "MUTED",
    "PALETTE",
    "label_line_ends",
    "layer_axis",
    "new_figure",
    "png_bytes",
    "save_figure",
    "star_at_peak",
    "styled",
]

P = ParamSpec("P")
T = TypeVar("T")

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#9A8A00")
COOLWARM = "coolwarm"
INK = "#22262e"
MUTED = "#7a818c"
DPI = 200
"""Pixels per inch of figures in files."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so figures look the same everywhere
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": "#b9bec7",
    "axes.labelcolor": INK,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "grid.color": "#e8eaee",
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.0,
    "pdf.fonttype": 42,  # text stays text in a PDF
    "savefig.facecolor": "white",
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
}


def styled(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` under the package's style, and leave matplotlib's settings as they were."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context():
            # A user's own settings must not change a figure; those of the backend are not ours to touch.
            matplotlib.rcdefaults()
            settings: Any = matplotlib.rcParams
            settings.update(_STYLE)
            return function(*args, **kwargs)

    return inside


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width x height`` inches with an Agg canvas."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


@styled
def png_bytes(figure: Figure, dpi: int = DPI) -> bytes:
    """Return the figure as a PNG file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


@styled
def save_figure(figure: Figure, stem: Path | str) -> list[Path]:
    """Write ``<stem>.png`` and ``<stem>.pdf``, without dates, and return both paths."""
    png, pdf = Path(f"{stem}.png"), Path(f"{stem}.pdf")
    png.write_bytes(png_bytes(figure))
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return [png, pdf]


def layer_axis(axes: Axes, n_layers: int) -> None:
    """Number the x axis by layer, from 0, thinned where there are many."""
    step = 1 if n_layers <= 16 else 2 if n_layers <= 32 else 4
    axes.set_xticks(range(0, n_layers, step))
    axes.set_xlabel("layer")
    axes.set_xlim(-0.5, n_layers - 0.5)


def star_at_peak(axes: Axes, values: Sequence[float], color: str, first_layer: int = 0) -> int:
    """Put a star on the largest value at or after ``first_layer`` and return its layer.

    Paper A excludes layer 0 for DINOv2, where every kind of attention spikes (its Fig. 15).
    """
    array = np.asarray(values, dtype=float)
    peak = first_layer + int(np.nanargmax(array[first_layer:]))
    axes.plot(
        peak,
        array[peak],
        marker="*",
        markersize=15,
        color=color,
        markeredgecolor="white",
        markeredgewidth=1.0,
        zorder=5,
        clip_on=False,
    )
    return peak


def label_line_ends(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write ``(text, y, color)`` right of the axes at the height of each line's end, without overlaps."""
    low, high = axes.get_ylim()
    height = axes.get_position().height * axes.get_figure(root=True).get_figheight()  # type: ignore[union-attr]
    gap = (high - low) * 0.19 / max(height, 0.5)
    placed = sorted(ends, key=lambda end: end[1])
    heights = [min(max(y, low), high) for _, y, _ in placed]
    # Push labels apart upwards, then back down from the top where the last one has left the axes.
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    ceiling = high + gap / 2
    for index in range(len(heights) - 1, -1, -1):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    for (text, _, color), y in zip(placed, heights, strict=True):
        axes.annotate(
            text,
            (1.0, y),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            ha="left",
            color=color,
            fontsize=8.5,
            annotation_clip=False,
        )
