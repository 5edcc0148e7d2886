"""Patch association as a number: does every patch attend to the patches that it belongs with?

Given a matrix of attentions or similarities between patches and, for every patch i, the set S_i of patches
that it belongs with (itself included, C_i of them):

* ``agreement``: the share of the C_i largest entries of row i that lie in S_i, a mean over i;
* ``exact``: the share of rows whose C_i largest entries are S_i, which is patch association after a third
  party's account of Jelassi, Sander and Li (2022);
* ``corrected``: agreement among the C_i - 1 largest entries to *other* patches, less what a random order
  gives, ``q_i = (C_i - 1) / (D - 1)``, over what it leaves: ``(a_i - q_i) / (1 - q_i)``, a mean over i: 0 by
  chance and 1 for all. A patch that attends to itself gains nothing by it.

Where entries are equal, as in uniform attention, their order says nothing: each counts as found with the
share of the equal ones that are still to be taken, which is the mean over all their orders.

The scalar scores are this project's own; the paper's exact definition is not known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vit_mechinterp.errors import DataError

__all__ = ["association", "members_of", "neighbourhoods"]


def members_of(sets: Sequence[Sequence[int]]) -> Bool[Tensor, "patch patch"]:
    """Return which patches share a set, for disjoint sets of the patches from 0 on."""
    n = sum(len(one) for one in sets)
    owner = torch.full((n,), -1)
    for number, one in enumerate(sets):
        owner[list(one)] = number
    return owner[:, None] == owner[None]


def neighbourhoods(grid: Sequence[int], radius: int = 1) -> Bool[Tensor, "patch patch"]:
    """Return which patches of a grid are at most ``radius`` rows and columns (and frames) apart."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid))
    return (places[:, None] - places[None]).abs().amax(dim=-1) <= radius


def association(
    matrix: Float[Tensor, "*batch patch patch"], members: Bool[Tensor, "patch patch"]
) -> dict[str, Float[Tensor, "*batch"]]:
    """Score matrices against the sets that patches belong with.

    Args:
        matrix: attentions or similarities, queries along rows.
        members: ``members[i, j]`` says that i belongs with j; the diagonal is True. Patches that belong with
            none or with all others are left out of the means.

    Returns:
        ``agreement``, ``exact`` and ``corrected``, see the module.

    Raises:
        DataError: the shapes differ, the diagonal is not True, an entry is not finite, or every set holds one
            patch or all of them, so that there is nothing to find.
    """
    if matrix.shape[-2:] != members.shape or not bool(members.diagonal().all()):
        raise DataError(
            f"Association compares matrices {tuple(matrix.shape)} with sets {tuple(members.shape)}: the "
            "last two axes are the same patches, each of which belongs with itself."
        )
    if not bool(matrix.isfinite().all()):
        raise DataError("Association needs finite attentions or similarities; some are infinite or NaN.")
    members = members.to(matrix.device)
    matrix = matrix.float()
    n, sizes = members.shape[0], members.sum(dim=1)
    counts = (sizes > 1) & (sizes < n)
    if not bool(counts.any()):
        raise DataError("No set holds more than one patch and fewer than all: there is nothing to find.")
    found = _found(matrix, members, sizes)
    agreement = found / sizes
    eye = torch.eye(n, dtype=torch.bool, device=matrix.device)
    others = (sizes - 1).clamp_min(1)
    share = _found(matrix.masked_fill(eye, -torch.inf), members & ~eye, others) / others
    chance = others / (n - 1)
    corrected = (share - chance) / (1 - chance)
    return {
        "agreement": agreement[..., counts].mean(dim=-1),
        "exact": (found > sizes - 1e-4).float()[..., counts].mean(dim=-1),
        "corrected": corrected[..., counts].mean(dim=-1),
    }


def _found(matrix: Tensor, members: Tensor, sizes: Tensor) -> Float[Tensor, "*batch patch"]:
    """How many of the largest entries of every row, as many as its set holds, are in it, over ties a mean."""
    members = members.expand(matrix.shape)
    places = (sizes - 1).expand(matrix.shape[:-1])[..., None]
    least = matrix.sort(dim=-1, descending=True).values.gather(-1, places)
    above, equal = matrix > least, matrix == least
    still = sizes - above.sum(dim=-1)
    tied = (equal & members).sum(dim=-1) / equal.sum(dim=-1).clamp_min(1)
    return (above & members).sum(dim=-1) + still * tied
