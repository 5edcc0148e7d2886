"""Effects of runs against a baseline: how far a metric moves, also as a share of the gap, and how surely."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vit_mechinterp.circuits.statistics import bootstrap_interval, bootstrap_ratio, sign_flip_p_values

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["effect_columns", "gap_problem", "strongest"]

ENDS = ("without the patch", "on the image that is patched from")

_SMALL = 0.01
"""A gap below this share of the metric's own size would blow every effect up a hundredfold."""


def gap_problem(
    baseline: Float[Tensor, " example"],
    target: Float[Tensor, " example"],
    ends: tuple[str, str] = ENDS,
) -> str:
    """Say why effects cannot be divided by the mean gap ``target - baseline``; empty where they can.

    ``ends`` says in words what both are.
    """
    gaps = (target - baseline).numpy()
    gap = float(gaps.mean())
    size = float(baseline.abs().mean() + target.abs().mean()) / 2
    said = f"the metric is {float(baseline.mean()):.4g} {ends[0]} and {float(target.mean()):.4g} {ends[1]}"
    if abs(gap) <= max(_SMALL * size, 1e-12):
        return f"{said}: a gap of {gap:.2g} is too small to divide by"
    if len(gaps) > 1:
        low, high = bootstrap_interval(gaps[None])
        if low[0] <= 0 <= high[0]:
            return f"{said}: over {len(gaps)} examples the gap of {gap:.2g} cannot be told from zero"
    return ""


def effect_columns(
    values: Float[Tensor, "run example"],
    baseline: Float[Tensor, " example"],
    target: Float[Tensor, " example"] | None = None,
    *,
    ends: tuple[str, str] = ENDS,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the columns that describe the effects of runs, one entry per run.

    Args:
        values: the metric of every run.
        baseline: the metric without the intervention.
        target: the metric of the image that is patched from; with it, effects are normalised.
        ends: what baseline and target are, in words.
        resamples, seed: of the bootstrap and of the permutation test.

    Returns:
        ``value``, the mean over examples; ``change``, the mean of (value - baseline), with ``change_low`` and
        ``change_high``, its 95 % bootstrap interval over examples; with ``target`` also ``normalised``,
        ``mean(value - baseline) / mean(target - baseline)`` with its interval and ``reason``, why it is NaN
        if it is; ``p_value`` and ``p_corrected`` of sign flips over examples (see `sign_flip_p_values`);
        ``n``. With one example, intervals and p-values are NaN.
    """
    changes = (values - baseline).numpy()
    n_runs, n = changes.shape
    nothing = np.full(n_runs, np.nan)
    columns: dict[str, Any] = {"value": values.mean(dim=1).numpy(), "change": changes.mean(axis=1)}
    low, high = bootstrap_interval(changes, resamples=resamples, seed=seed) if n > 1 else (nothing, nothing)
    columns |= {"change_low": low, "change_high": high}
    if target is not None:
        gaps = (target - baseline).numpy()
        reason = gap_problem(baseline, target, ends)
        ratio, low, high = nothing, nothing, nothing
        if not reason:
            ratio = changes.mean(axis=1) / gaps.mean()
            if n > 1:
                low, high = bootstrap_ratio(changes, gaps, resamples=resamples, seed=seed)
        columns |= {"normalised": ratio, "normalised_low": low, "normalised_high": high, "reason": reason}
    alone, corrected = sign_flip_p_values(changes, resamples=resamples, seed=seed)
    return columns | {"p_value": alone, "p_corrected": corrected, "n": n}


def strongest(rows: pd.DataFrame, column: str) -> Any:
    """Return the row with the largest size in a column; the first where a metric left no number in any."""
    sizes = rows[column].abs()
    return rows.iloc[0 if sizes.isna().all() else int(sizes.argmax())]
