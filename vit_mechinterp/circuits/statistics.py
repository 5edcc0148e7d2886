"""Uncertainty of a mean over examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vit_mechinterp.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["bootstrap_interval"]


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
