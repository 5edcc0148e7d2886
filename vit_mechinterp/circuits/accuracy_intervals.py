"""Intervals of accuracies, over images and over seeds, and whether chance is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHANCE", "over_images", "over_seeds", "verdict"]

CHANCE = 0.5


def over_images(accuracy: float, n: int, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of an accuracy on n images.

    How many of n images drawn with replacement were answered rightly follows the binomial distribution, so
    that is what is drawn.
    """
    right = np.random.default_rng(seed).binomial(n, round(accuracy * n) / n, size=resamples)
    low, high = np.quantile(right / n, [0.025, 0.975])
    return float(low), float(high)


def over_seeds(accuracies: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of the mean over seeds by Student's t, cut to 0 .. 1; at least two seeds."""
    from scipy.stats import t  # type: ignore[import-untyped]

    n = len(accuracies)
    mean = float(accuracies.mean())
    half = float(t.ppf(0.975, n - 1) * accuracies.std(ddof=1) / np.sqrt(n))
    return max(mean - half, 0.0), min(mean + half, 1.0)


def verdict(
    bounds: tuple[float, float], alone: Sequence[tuple[float, float]]
) -> Literal["above", "below", "at chance", "undecided"]:
    """Say where an interval lies.

    Args:
        bounds: the interval.
        alone: those of each seed alone, over its images. Where all of them lie off chance on one side but the
            interval over seeds contains it, as with very few seeds it may, nothing is decided.
    """
    low, high = bounds
    if low > CHANCE:
        return "above"
    if high < CHANCE:
        return "below"
    one_side = all(own[0] > CHANCE for own in alone) or all(own[1] < CHANCE for own in alone)
    return "undecided" if one_side else "at chance"
