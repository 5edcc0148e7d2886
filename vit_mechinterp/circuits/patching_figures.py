"""Figures of an activation patching: maps over the image, heads by layer, and tokens by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_mechinterp.circuits.result import CircuitResult

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["captions_of", "drawing", "shown_column"]


def shown_column(table: pd.DataFrame, prefix: str = "") -> str:
    """Return the column that figures show: shares of the gap, or changes where no gap can be divided by."""
    return "change" if table[f"{prefix}normalised"].isna().all() else "normalised"


def captions_of(table: pd.DataFrame, n: int) -> dict[str, str]:
    """Say what each figure shows, for a table over ``n`` pairs."""
    pairs = "One pair" if n == 1 else f"Mean over {n} pairs"
    normalised = shown_column(table) == "normalised"
    what = "share of the gap" if normalised else "change of the metric (no gap to divide by)"
    captions = {}
    for way, site, kind in _panels(table):
        if kind == "head":
            captions[f"{way}_heads_{site}"] = f"{way.capitalize()} each head at {site}: {what}. {pairs}."
        elif kind == "patches":
            captions[f"{way}_map_{site}"] = (
                f"{way.capitalize()} {site} layer by layer: {what} of each square of patches, over the clean "
                f"image of one pair; colours are strong where effects are."
            )
    for way in dict.fromkeys(table["direction"]):
        captions[f"{way}_tokens"] = (
            f"{way.capitalize()}: {what} by layer for tokens that are no patches, and the patch square with "
            f"the largest effect. {pairs}."
        )
    return {key.replace(".", "_"): text for key, text in captions.items()}


def _panels(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    rows = table[table["kind"].isin(["patches", "head"])]
    return list(rows[["direction", "site", "kind"]].drop_duplicates().itertuples(index=False, name=None))


def drawing(
    pictures: Mapping[str, Image], grid: tuple[int, ...], side: int, label: str
) -> Callable[[CircuitResult], dict[str, Figure]]:
    """Return the function that draws a result.

    Args:
        pictures: name to image as the model sees it; maps lie over the first.
        grid: the model's patch grid.
        side: patches along the side of a square.
        label: what the metric is called.
    """

    def draw(result: CircuitResult) -> dict[str, Figure]:
        from vit_mechinterp.figures import condition_map, head_layer_map, position_maps, round_up

        table, figures = result.table, {}
        column = shown_column(table)
        what = _label(column, label)
        for way, site, kind in _panels(table):
            rows = table[(table["direction"] == way) & (table["site"] == site) & (table["kind"] == kind)]
            if kind == "patches":
                pair = f"pair_{shown_column(rows, 'pair_')}"
                bound = round_up(float(rows[pair].abs().max()))
                maps = {f"layer {n}": _map(own, pair, grid, side) for n, own in rows.groupby("layer")}
                figures[f"{way}_map_{site}"] = position_maps(
                    pictures,
                    maps,
                    limits=(-bound, bound),
                    label=_label(pair, label),
                    title=f"{site}, {way}",
                )
            else:
                bound = round_up(float(rows[column].abs().max()))
                wide = rows.pivot_table(index="layer", columns="head", values=column, dropna=False)
                wide = wide.reindex(range(int(table["layer"].max()) + 1))
                figures[f"{way}_heads_{site}"] = head_layer_map(
                    wide.to_numpy(dtype=float),
                    title=f"{site}, {way}",
                    label=what,
                    ends=("", ""),
                    limits=(-bound, bound),
                )
        for way in dict.fromkeys(table["direction"]):
            own = table[table["direction"] == way]
            lines = _token_lines(own, column)
            if lines is not None:
                names, values = lines
                bound = round_up(float(np.nan_to_num(np.abs(values)).max()))
                figures[f"{way}_tokens"] = condition_map(
                    values, names, label=what, title=str(way), limits=(-bound, bound)
                )
        return {key.replace(".", "_"): figure for key, figure in figures.items()}

    return draw


def _label(column: str, metric: str) -> str:
    return "share of the gap" if column.endswith("normalised") else f"change of {metric}"


def _map(rows: pd.DataFrame, column: str, grid: tuple[int, ...], side: int) -> Any:
    """Spread every square's value over its patches; of a video the mean over frames."""
    height, width = grid[-2:]
    sums, counts = np.zeros((height, width)), np.zeros((height, width))
    for row, left, value in zip(rows["row"], rows["column"], rows[column], strict=True):
        sums[row : row + side, left : left + side] += value
        counts[row : row + side, left : left + side] += 1
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _token_lines(table: pd.DataFrame, column: str) -> tuple[list[str], Any] | None:
    lines: dict[str, Any] = {}
    layers = range(int(table["layer"].max()) + 1)
    for site, rows in table[table["kind"].isin(["tokens", "patches"])].groupby("site", sort=False):
        for token, own in rows[rows["kind"] == "tokens"].groupby("tokens", sort=False):
            lines[f"{site}, {token}"] = own.set_index("layer")[column].reindex(layers).to_numpy(dtype=float)
        squares = rows[rows["kind"] == "patches"]
        if len(squares):
            top = squares.loc[squares[column].abs().fillna(0).groupby(squares["layer"]).idxmax()]
            best = top.set_index("layer")[column].reindex(layers)
            lines[f"{site}, strongest patches"] = best.to_numpy(dtype=float)
    return (list(lines), np.stack(list(lines.values()), axis=1)) if lines else None
