"""Figures of the circuit that reads attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vit_mechinterp.circuits.attribution_figures import patch_grid
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.model.layout import TokenLayout

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["captions_of", "drawing"]


def captions_of(table: pd.DataFrame, n: int, query: str) -> dict[str, str]:
    """Say what each figure shows."""
    mean = "One image" if n == 1 else f"Mean over {n} images"
    captions = {"tiles": f"What every head attends to from {query}: one tile per layer and head. One image."}
    if (table["kind"] == "rollout").any():
        captions["rollout"] = f"Attention followed through all layers, from {query}. One image."
    for name in dict.fromkeys(table[table["kind"] == "head"]["quantity"]):
        what = {
            "distance": "Mean distance of attention in patches",
            "entropy": "Entropy of attention in nats",
        }
        said = what.get(name, f"Attention of patches {name}")
        captions[name.replace(" ", "_")] = (
            f"{said}, per layer and head, beside that of attention to all tokens alike. {mean}."
        )
    if (table["kind"] == "similarity").any():
        captions["similarity"] = f"How alike heads attend: 1 is the same pattern. {mean}."
    return captions


def drawing(
    picture: Image, layout: TokenLayout, n_layers: int, query: str
) -> Callable[[CircuitResult], dict[str, Figure]]:
    """Return the function that draws a result over an image."""

    def draw(result: CircuitResult) -> dict[str, Figure]:
        from vit_mechinterp.figures import attention_overlay, head_layer_map, node_matrix
        from vit_mechinterp.figures.tiles import attention_tiles

        table, figures = result.table, {}
        maps = table[table["kind"] == "map"]
        tiles = {
            (int(rows["layer"].iloc[0]), int(rows["head"].iloc[0])): patch_grid(rows["value"], layout)
            for _, rows in maps.groupby(["layer", "head"])
        }
        figures["tiles"] = attention_tiles(picture, tiles, title=f"from {query}")
        rollouts = {
            {"gradient": "with gradient"}.get(str(name), str(name)): patch_grid(rows["value"], layout)
            for name, rows in table[table["kind"] == "rollout"].groupby("quantity", sort=False)
        }
        if rollouts:
            figures["rollout"] = attention_overlay(picture, rollouts)
        heads, control = table[table["kind"] == "head"], table[table["kind"] == "control"]
        for name in dict.fromkeys(heads["quantity"]):
            rows = heads[heads["quantity"] == name]
            wide = rows.pivot_table(index="layer", columns="head", values="value").reindex(range(n_layers))
            uniform = float(control[control["quantity"] == name]["value"].iloc[0])
            labels = {"distance": "distance (patches)", "entropy": "entropy (nats)"}
            words = {"distance": ("near", "far"), "entropy": ("sharp", "even")}
            figures[name.replace(" ", "_")] = head_layer_map(
                wide.to_numpy(dtype=float),
                label=labels.get(name, f"attention {name}"),
                ends=words.get(name, ("", "")),
                limits=_limits(name, rows["value"].to_numpy(dtype=float), uniform),
                title=f"uniform attention: {uniform:.2f}",
            )
        pairs = table[table["kind"] == "similarity"]
        if len(pairs):
            figures["similarity"] = node_matrix(
                *_square(pairs), limits=(0.0, 1.0), row_label="head", column_label="head", label="similarity"
            )
        return figures

    return draw


def _limits(name: str, values: np.ndarray, uniform: float) -> tuple[float, float]:
    """The range of the colours: what attention to all tokens alike would give is the middle of a distance and
    the top of an entropy, which cannot be larger; shares begin at 0.
    """
    from vit_mechinterp.figures import round_up

    if name == "entropy":
        return 0.0, round(uniform, 2)
    if name == "distance":
        reach = round_up(max(0.1, float(np.abs(values - uniform).max())))
        return round(uniform - reach, 2), round(uniform + reach, 2)
    return 0.0, round_up(max(float(values.max()), uniform))


def _square(pairs: pd.DataFrame) -> tuple[np.ndarray, list[str], list[str]]:
    one = list(zip(pairs["layer"], pairs["head"], strict=True))
    other = list(zip(pairs["other_layer"], pairs["other_head"], strict=True))
    place = {node: index for index, node in enumerate(sorted({*one, *other}))}
    matrix = np.eye(len(place))
    for a, b, value in zip(one, other, pairs["value"], strict=True):
        matrix[place[a], place[b]] = matrix[place[b], place[a]] = value
    names = [f"{layer}.{head}" for layer, head in place]
    return matrix, names, names
