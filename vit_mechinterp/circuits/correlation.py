"""Correlations of a few points, with intervals, and with each point left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

__all__ = ["Correlation", "correlation", "fisher_interval", "pearson", "spearman"]

Numbers = Float[np.ndarray, " point"]


@dataclass(frozen=True)
class Correlation:
    """How two quantities go together over some points.

    Attributes:
        pearson, spearman: the coefficients; NaN for fewer than three points, or where one does not vary.
        fisher: interval of Pearson's by Fisher's transformation; NaN for fewer than four points.
        pearson_bootstrap, spearman_bootstrap: percentile intervals over resampled points.
        pearson_without, spearman_without: the coefficients without each point, in order.
        n: number of points.
    """

    pearson: float
    spearman: float
    fisher: tuple[float, float]
    pearson_bootstrap: tuple[float, float]
    spearman_bootstrap: tuple[float, float]
    pearson_without: tuple[float, ...]
    spearman_without: tuple[float, ...]
    n: int


def correlation(
    x: Numbers, y: Numbers, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Correlation:
    """Correlate two quantities over some points.

    Args:
        x, y: one entry per point.
        level: the share that an interval spans.
        resamples: how many times as many points are drawn anew, with replacement; draws in which one quantity
            does not vary are left out.
        seed: seeds the draws.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    n = len(x)
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n)) if n else np.zeros((0, 0), dtype=int)
    others = [np.delete(np.arange(n), point) for point in range(n)]
    return Correlation(
        pearson=pearson(x, y),
        spearman=spearman(x, y),
        fisher=fisher_interval(pearson(x, y), n, level),
        pearson_bootstrap=_interval([pearson(x[own], y[own]) for own in drawn], level),
        spearman_bootstrap=_interval([spearman(x[own], y[own]) for own in drawn], level),
        pearson_without=tuple(pearson(x[own], y[own]) for own in others),
        spearman_without=tuple(spearman(x[own], y[own]) for own in others),
        n=n,
    )


def pearson(x: Numbers, y: Numbers) -> float:
    """Pearson's coefficient; NaN for fewer than three points, or where one quantity does not vary."""
    if len(x) < 3:
        return math.nan
    a, b = x - x.mean(), y - y.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    # What is left of equal numbers is rounding.
    if size <= 1e-15 * len(x) * max(1.0, float(np.abs(x).max() * np.abs(y).max())):
        return math.nan
    return min(1.0, max(-1.0, float(a @ b) / size))


def spearman(x: Numbers, y: Numbers) -> float:
    """Spearman's coefficient: Pearson's of the ranks, ties sharing their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def fisher_interval(r: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of a Pearson coefficient over ``n`` points by Fisher's transformation (normal data); NaN
    for fewer than four points.
    """
    if n < 4 or math.isnan(r):
        return math.nan, math.nan
    if abs(r) == 1.0:
        return r, r
    reach = NormalDist().inv_cdf(0.5 + level / 2) / math.sqrt(n - 3)
    return math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach)


def _ranks(values: Numbers) -> Numbers:
    below = (values[:, None] > values[None, :]).sum(axis=1)
    level = (values[:, None] == values[None, :]).sum(axis=1)
    return np.asarray(below + (level + 1) / 2, dtype=float)


def _interval(values: list[float], level: float) -> tuple[float, float]:
    kept = [value for value in values if not math.isnan(value)]
    if not kept:
        return math.nan, math.nan
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
