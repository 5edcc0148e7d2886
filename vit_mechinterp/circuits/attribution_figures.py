"""Figures of a logit's parts: layers, heads, the image, neurons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.model.layout import TokenLayout

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["captions_of", "drawing", "patch_grid", "patch_words"]


def patch_grid(values: Any, layout: TokenLayout) -> Any:
    """Return the values of the patches among those of all tokens, as the grid of the (first) frame."""
    first = len(layout.prefix)
    rows, columns = layout.grid[-2:]
    return np.asarray(values, dtype=float)[first : first + rows * columns].reshape(rows, columns)


def patch_words(words: Sequence[str], layout: TokenLayout) -> list[list[str]]:
    """Return the words of the patches among those of all tokens, as rows of the (first) frame."""
    first, (rows, columns) = len(layout.prefix), layout.grid[-2:]
    return [list(words[first + row * columns : first + (row + 1) * columns]) for row in range(rows)]


def _by_patch(table: pd.DataFrame, layout: TokenLayout) -> Any:
    """What lies at every patch of the last stream; None where the readout takes nothing from patches."""
    tokens = table[table["kind"] == "token"]
    grid = patch_grid(tokens["example_contribution"], layout) if len(tokens) else np.zeros(1)
    return grid if np.abs(grid).max() > 0 else None


def captions_of(table: pd.DataFrame, n: int, label: str, layout: TokenLayout) -> dict[str, str]:
    """Say what each figure shows, for a table over ``n`` images."""
    mean = "One image" if n == 1 else f"Mean over {n} images"
    captions = {"build_up": f"The {label} as it builds up: parts and their sum so far. {mean}."}
    if (table["kind"] == "head").any():
        captions["heads"] = f"What every head adds to the {label} directly. {mean}."
    if (table["kind"] == "source").any():
        captions["sources"] = (
            f"Where in the image each layer's heads bring their part of the {label} from. One image."
        )
    if _by_patch(table, layout) is not None:
        captions["tokens"] = f"Where the {label} lies in the last residual stream. One image."
    if (table["kind"] == "neuron").any():
        captions["neurons"] = f"The neurons that add most to the {label} directly. {mean}."
    return captions


def drawing(
    pictures: Mapping[str, Image], layout: TokenLayout, label: str
) -> Callable[[CircuitResult], dict[str, Figure]]:
    """Return the function that draws a result, with maps over the first picture."""

    def draw(result: CircuitResult) -> dict[str, Figure]:
        from vit_mechinterp.figures import dots_by_row, head_layer_map, position_maps, round_up
        from vit_mechinterp.figures.bars import build_up

        table, figures = result.table, {}
        figures["build_up"] = build_up(*_steps(table), label=f"contribution to the {label}")
        heads = table[table["part"] == "head"]
        if len(heads):
            wide = heads.pivot_table(index="layer", columns="head", values="contribution")
            wide = wide.reindex(range(int(heads["layer"].max()) + 1))
            bound = round_up(float(heads["contribution"].abs().max()))
            figures["heads"] = head_layer_map(
                wide.to_numpy(dtype=float),
                label=f"{label}, direct",
                ends=("against", "for"),
                limits=(-bound, bound),
            )
        sources = table[table["kind"] == "source"]
        if len(sources):
            maps = {
                f"layer {layer}": patch_grid(rows["example_contribution"], layout)
                for layer, rows in sources.groupby("layer")
            }
            bound = round_up(float(max(np.abs(values).max() for values in maps.values())))
            figures["sources"] = position_maps(
                pictures, maps, limits=(-bound, bound), label=f"{label}, direct"
            )
        grid = _by_patch(table, layout)
        if grid is not None:
            bound = round_up(float(np.abs(grid).max()))
            figures["tokens"] = position_maps(
                pictures, {"last stream": grid}, limits=(-bound, bound), label=f"{label}, by position"
            )
        neurons = table[table["kind"] == "neuron"].head(12)
        if len(neurons):
            ends = neurons[["contribution", "contribution_low", "contribution_high"]].to_numpy(dtype=float)
            ends = np.where(np.isfinite(ends), ends, ends[:, :1])
            names = [
                f"layer {r}, neuron {k}" for r, k in zip(neurons["layer"], neurons["neuron"], strict=True)
            ]
            rows = {name: (float(a), float(b), float(c)) for name, (a, b, c) in zip(names, ends, strict=True)}
            reach = round_up(float(np.abs(ends).max()))
            figures["neurons"] = dots_by_row(
                {"neurons": rows}, label=f"{label}, direct", limits=(-reach, reach)
            )
        return figures

    return draw


def _steps(table: pd.DataFrame) -> tuple[list[str], list[str], Any]:
    rows = table[table["kind"] == "component"]
    short = {"attn_out": "attention", "mlp_out": "MLP"}
    names = [
        short.get(part, part) + ("" if str(layer) == "<NA>" else f" {layer}")
        for part, layer in zip(rows["part"], rows["layer"], strict=True)
    ]
    groups = [short.get(part, "other") for part in rows["part"]]
    return names, groups, rows["contribution"].to_numpy(dtype=float)
