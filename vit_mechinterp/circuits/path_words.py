"""What a path patching says in words: summary, description, findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vit_mechinterp.circuits.bound_metric import BoundMetric
from vit_mechinterp.circuits.effects import gap_problem, strongest
from vit_mechinterp.circuits.path_figures import shown_column

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["description_of", "findings_of", "summary_of"]


def summary_of(table: pd.DataFrame, metric: BoundMetric) -> dict[str, float | int | str]:
    """Return the strongest paths, and the ends of the gap."""
    paths = table[table["sender_kind"] != "control"]
    column = shown_column(table)
    top = paths.reindex(paths[column].abs().sort_values(ascending=False).index).head(5)
    summary: dict[str, float | int | str] = {
        f"{row['sender']} into {row['receiver']}": float(row[column]) for _, row in top.iterrows()
    }
    assert metric.other is not None
    return summary | {
        f"{metric.label}, clean": float(metric.clean.mean()),
        f"{metric.label}, corrupted": float(metric.other.mean()),
        "paths": len(paths),
    }


def findings_of(table: pd.DataFrame) -> str:
    """Name the strongest path."""
    column = shown_column(table)
    paths = table[table["sender_kind"] != "control"]
    top = strongest(paths, column)
    what = "of the gap" if column == "normalised" else "of the metric"
    return f"Strongest of {len(paths)}: {top['sender']} into {top['receiver']}, {top[column]:+.2f} {what}."


def description_of(
    metric: BoundMetric,
    direction: str,
    freeze: bool,
    left_out: dict[str, str],
    ends: Sequence[Any],
    branches: Sequence[int],
) -> list[str]:
    """Say what was done, what was measured, and what could not be."""
    came = "corrupted" if direction == "noising" else "clean"
    other = "clean" if direction == "noising" else "corrupted"
    held = "every later head and MLP" if freeze else "every later head (MLPs are computed anew)"
    problem = gap_problem(*ends)
    missing = "; ".join(f"{site} ({reason})" for site, reason in left_out.items())
    layers = ", ".join(map(str, branches))
    return [
        f"One sender takes its value from the {came} image in the {other} image's forward, while {held} "
        "keeps the value that it had: only the residual stream carries the change. What a receiver reads "
        f"there is then put into the {other} image's forward. 0 is no effect, 1 the whole gap between both "
        "images.",
        metric.description,
        f"Something besides attention and MLP writes into the stream of layers {layers}; it is computed anew."
        if branches
        else "",
        f"Effects are not normalised: {problem}." if problem else "",
        f"Left out: {missing}." if missing else "",
    ]
