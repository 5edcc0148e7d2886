"""Vectors that no image gave: made of those that images gave, or of noise (Lepori et al. 2024, section 5).

Let ``E_p [item, r]`` be the coordinates of the source object's p-th token in the trained subspace, over the
items of the validation data, and E all of them:

* ``"added"``: ``E_p[a] + E_p[b]`` for two random items, the same two for all tokens of an object;
* ``"interpolated"``: ``0.5 E_p[a] + 0.5 E_p[b]``;
* ``"sampled"``: from ``N(mean(E), diag(std(E)^2))`` by dimension, one vector for all tokens of an object;
* ``"random"``: from ``N(0, I)``, one vector for all tokens of an object.

Where every token has a subspace of its own, coordinates of one token say nothing of another's: sampled
vectors take the mean and the deviation of ``E_p``, and every token gets noise of its own.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["METHODS", "Method", "novel_vectors"]

Method = Literal["added", "interpolated", "sampled", "random"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)


def novel_vectors(
    method: Method,
    values: Float[Tensor, "item token r"],
    n: int,
    random: np.random.Generator,
    *,
    tied: bool = True,
) -> Float[Tensor, "n token r"] | Float[Tensor, "n r"]:
    """Draw ``n`` vectors.

    Args:
        method: how.
        values: ``E_p`` along the tokens.
        n: how many.
        random: draws items and noise.
        tied: whether all tokens share the subspace.

    Returns:
        One vector per token of an object, or one for all of them.
    """
    items, tokens, r = values.shape
    if method in ("added", "interpolated"):
        one, other = torch.from_numpy(random.integers(items, size=(2, n)))
        total = values[one] + values[other]
        return total if method == "added" else 0.5 * total
    size = (n, r) if tied else (n, tokens, r)
    noise = torch.from_numpy(random.standard_normal(size).astype(np.float32))
    if method == "random":
        return noise
    every = values.flatten(0, 1) if tied else values
    return every.mean(dim=0) + every.std(dim=0) * noise
