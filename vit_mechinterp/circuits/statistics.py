"""Uncertainty of a mean over examples, and of ratios of means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vit_mechinterp.errors import DataError, SpecError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["bootstrap_interval", "bootstrap_ratio", "check_resampling", "sign_flip_p_values"]

_AT_ONCE = 1024
"""Quantities whose statistics under every assignment of signs are held at once."""


def check_resampling(resamples: int, seed: int) -> None:
    """Raise SpecError unless intervals can be drawn like this; circuits ask before any work."""
    if resamples < 1:
        raise SpecError(f"resamples={resamples}: an interval takes at least 1, and 2000 are usual.")
    if seed < 0:
        raise SpecError(f"seed={seed}: a seed is a whole number, 0 or more.")


def bootstrap_interval(
    values: Float[np.ndarray, "quantity example"],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " quantity"], Float[np.ndarray, " quantity"]]:
    """Return the lower and upper ends of percentile bootstrap intervals of means over examples.

    All quantities are resampled together: every resample draws the same examples for each of them, so
    intervals of quantities measured on the same examples can be compared.

    Args:
        values: one row per quantity, one column per example.
        resamples: how many times as many examples are drawn anew, with replacement.
        level: the share of the resampled means that an interval spans.
        seed: seeds the draws.

    Raises:
        DataError: there is no example.
    """
    array = np.asarray(values, dtype=float)
    n = array.shape[-1]
    if n == 0:
        raise DataError("A mean over no example has no interval.")
    generator = np.random.default_rng(seed)
    # How often each example is drawn is all that a resampled mean depends on.
    counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples)
    means = array @ counts.T / n
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=-1)
    return low, high


def bootstrap_ratio(
    numerator: Float[np.ndarray, "quantity example"],
    denominator: Float[np.ndarray, " example"],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " quantity"], Float[np.ndarray, " quantity"]]:
    """Return percentile bootstrap intervals of ratios of means, ``mean(numerator) / mean(denominator)``.

    Every resample draws the same examples above and below the line. Resamples whose denominator vanishes are
    left out.

    Args:
        numerator: one row per quantity, one column per example.
        denominator: one entry per example.
        resamples: how many times as many examples are drawn anew, with replacement.
        level: the share of the resampled ratios that an interval spans.
        seed: seeds the draws.

    Raises:
        DataError: there is no example.
    """
    above, below = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    n = above.shape[-1]
    if n == 0:
        raise DataError("A mean over no example has no interval.")
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    totals = counts @ below
    kept = np.abs(totals) > 1e-12 * np.abs(below).sum()
    if not kept.any():
        return np.full(len(above), np.nan), np.full(len(above), np.nan)
    tail = (1 - level) / 2
    low, high = np.quantile(above @ counts[kept].T / totals[kept], [tail, 1 - tail], axis=-1)
    return low, high


def sign_flip_p_values(
    changes: Float[np.ndarray, "quantity example"], *, resamples: int = 2000, seed: int = 0
) -> tuple[Float[np.ndarray, " quantity"], Float[np.ndarray, " quantity"]]:
    """Return two-sided p-values of paired changes: each alone, and corrected for looking at all of them.

    A permutation test: had nothing an effect, every example's change could as well have had the other sign.
    The statistic is the sum of the changes over the root of the sum of their squares (which the signs leave
    alone). The correction compares each quantity with the largest statistic over all of them (Westfall and
    Young 1993), so it holds the error of the whole family. All assignments of signs are tried where they are
    no more than ``resamples``; otherwise that many are drawn, and the observed one counts among them.

    Args:
        changes: one row per quantity, one column per example.
        resamples: most assignments of signs.
        seed: seeds the draws.

    Returns:
        Both p-values of every quantity; NaN with fewer than two examples, and where a change is not finite.
        With n examples none is below ``2 / 2**n``.
    """
    array = np.asarray(changes, dtype=float)
    n_quantities, n = array.shape
    if n < 2:
        return np.full(n_quantities, np.nan), np.full(n_quantities, np.nan)
    if 2**n <= resamples:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, size=(resamples - 1, n))
        signs = np.concatenate([np.ones((1, n), dtype=int), 1 - 2 * drawn])
    measured = np.isfinite(array).all(axis=1)
    if not measured.all():
        # What could not be measured has no p-value, and must not take part in the correction of the others.
        both = np.full((2, n_quantities), np.nan)
        if measured.any():
            both[:, measured] = sign_flip_p_values(array[measured], resamples=resamples, seed=seed)
        return both[0], both[1]
    size = np.sqrt((array**2).sum(axis=1, keepdims=True))
    scaled = np.divide(array, size, out=np.zeros_like(array), where=size > 0)
    family = np.zeros(len(signs))
    alone = np.empty(n_quantities)
    observed = np.empty(n_quantities)
    for start in range(0, n_quantities, _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        found = np.abs(scaled[rows] @ signs.T)
        # Sums of the same numbers in another order differ in their last bits.
        observed[rows] = found[:, 0] * (1 - 1e-9) - 1e-12
        alone[rows] = (found >= observed[rows, None]).mean(axis=1)
        family = np.maximum(family, found.max(axis=0))
    ordered = np.sort(family)
    corrected = 1 - np.searchsorted(ordered, observed, side="left") / len(ordered)
    return alone, corrected
