"""Figures of path and edge patching: senders by layer for one receiver, matrices for many."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_mechinterp.circuits.result import CircuitResult

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["captions_of", "draw_paths", "sender_map", "shown_column"]

_MOST_MAPS = 4


def shown_column(table: pd.DataFrame) -> str:
    """Return the column that figures show: shares of the gap, or changes where no gap can be divided by."""
    return "change" if table["normalised"].isna().all() else "normalised"


def captions_of(table: pd.DataFrame) -> dict[str, str]:
    """Say what each figure shows."""
    receivers = _receivers(table)
    what = "Share of the gap" if shown_column(table) == "normalised" else "Change of the metric"
    captions = {}
    if len(receivers) <= _MOST_MAPS:
        for receiver in receivers:
            captions[_name(receiver)] = f"{what} that each head and MLP causes through {receiver}."
    else:
        captions["edges"] = f"{what} through every edge; pairs left blank do not follow each other."
    if "total" in table:
        captions["total"] = f"{what} when a sender is patched and nothing is held: all its paths together."
    return captions


def draw_paths(label: str) -> Callable[[CircuitResult], dict[str, Figure]]:
    """Return the function that draws a result; ``label`` is what the metric is called."""

    def draw(result: CircuitResult) -> dict[str, Figure]:
        from vit_mechinterp.figures import condition_map, node_matrix, round_up

        table = result.table[result.table["sender_kind"] != "control"]
        column, receivers = shown_column(table), _receivers(result.table)
        what = "share of the gap" if column == "normalised" else f"change of {label}"
        figures: dict[str, Figure] = {}
        bound = round_up(float(table[column].abs().max()))
        if len(receivers) <= _MOST_MAPS:
            for receiver in receivers:
                values, names = sender_map(table[table["receiver"] == receiver], column)
                figures[_name(receiver)] = condition_map(
                    values, names, label=what, title=f"into {receiver}", limits=(-bound, bound)
                )
        else:
            wide = table.pivot_table(index="sender", columns="receiver", values=column)
            senders = list(dict.fromkeys(table["sender"]))
            figures["edges"] = node_matrix(
                wide.reindex(index=senders, columns=receivers).to_numpy(dtype=float),
                senders,
                receivers,
                row_label="sender",
                column_label="receiver",
                label=what,
                limits=(-bound, bound),
            )
        if "total" in table:
            own = table.drop_duplicates("sender")
            # In the unit of the direct effects, with which it is compared.
            total = "total" if column == "change" else "total_normalised"
            values, names = sender_map(own, total)
            bound = round_up(float(own[total].abs().max()))
            figures["total"] = condition_map(
                values, names, label=what, title="nothing held", limits=(-bound, bound)
            )
        return figures

    return draw


def sender_map(rows: pd.DataFrame, column: str) -> tuple[Any, list[str]]:
    """Lay senders out by layer: ``[layer, head or MLP]`` with the names of the second axis."""
    inside = rows[rows["sender_layer"].notna()]
    heads = sorted({int(head) for head in inside["sender_head"].dropna()})
    lines = {f"head {head}": inside[inside["sender_head"] == head] for head in heads}
    whole = inside[inside["sender_head"].isna()]
    for kind, name in (("head", "all heads"), ("attn_out", "attention"), ("mlp", "MLP")):
        if (own := whole[whole["sender_kind"] == kind]).shape[0]:
            lines[name] = own
    if (embed := rows[rows["sender_layer"].isna()]).shape[0]:
        lines["embed"] = embed.assign(sender_layer=0)
    n_layers = int(max([0, *inside["sender_layer"]])) + 1
    table = np.full((n_layers, len(lines)), np.nan)
    for place, own in enumerate(lines.values()):
        table[own["sender_layer"].to_numpy(dtype=int), place] = own[column].to_numpy(dtype=float)
    return table, list(lines)


def _receivers(table: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(table.loc[table["sender_kind"] != "control", "receiver"]))


def _name(receiver: str) -> str:
    return "into_" + re.sub(r"\W+", "_", receiver)
