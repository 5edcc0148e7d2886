"""Numbers and maps of attention patterns, as functions of the patterns alone.

A pattern is ``[batch, head, query, key]`` with rows that sum to 1; token axes follow the model's layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.model.layout import TokenLayout

__all__ = ["MEASURES", "head_measures", "patch_distances", "relevance", "rollout", "similarity"]

MEASURES = ("distance", "entropy")
"""Measures that every model has; ``to NAME`` for each special token comes on top."""


def patch_distances(layout: TokenLayout) -> Float[Tensor, "patch patch"]:
    """Return the distances between patches, in patches (Euclidean; frames of a video one patch apart)."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in layout.grid), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], dim=1)
    return torch.cdist(places, places)


def head_measures(
    pattern: Float[Tensor, "batch head token token"], layout: TokenLayout
) -> dict[str, Float[Tensor, "batch head"]]:
    """Return what every head does, each a mean over the patches as queries.

    ``distance``: mean distance in patches to the attended patches, by the share of attention among patches
    (Dosovitskiy et al. 2021, appendix D.7); ``entropy`` of the row in nats; ``to NAME``: attention that each
    special token of the layout receives (registers together).
    """
    first, n = len(layout.prefix), layout.n_patches
    rows = pattern.double()[:, :, first : first + n]
    among = rows[..., first : first + n]
    far = (among * patch_distances(layout).to(among.device)).sum(-1) / among.sum(-1).clamp(min=1e-30)
    found = {"distance": far.mean(-1), "entropy": torch.special.entr(rows).sum(-1).mean(-1)}
    for name in layout.names:
        if name not in ("all", "patches"):
            found[f"to {name}"] = rows[..., layout.positions(name) or []].sum(-1).mean(-1)
    return found


def rollout(
    patterns: Sequence[Float[Tensor, "batch head token token"]],
) -> Float[Tensor, "batch token token"]:
    """Return attention rollout (Abnar and Zuidema 2020): half the mean over heads, half the skip connection,
    multiplied over layers.
    """
    n = patterns[0].shape[-1]
    eye = torch.eye(n, dtype=torch.float64, device=patterns[0].device)
    joint = eye.expand(len(patterns[0]), n, n)
    for pattern in patterns:
        mixed = 0.5 * pattern.double().mean(1) + 0.5 * eye
        joint = (mixed / mixed.sum(-1, keepdim=True)) @ joint
    return joint


def relevance(
    patterns: Sequence[Float[Tensor, "batch head token token"]],
    gradients: Sequence[Float[Tensor, "batch head token token"]],
) -> Float[Tensor, "batch token token"]:
    """Return the gradient variant (Chefer et al. 2021, equations 5 and 6): heads count by the positive part
    of gradient times pattern, and add to what was collected below.
    """
    n = patterns[0].shape[-1]
    joint = torch.eye(n, dtype=torch.float64, device=patterns[0].device).expand(len(patterns[0]), n, n)
    for pattern, gradient in zip(patterns, gradients, strict=True):
        joint = joint + (gradient.double() * pattern.double()).clamp(min=0).mean(1) @ joint
    return joint


def similarity(patterns: Float[Tensor, "batch head token token"]) -> Float[Tensor, "batch head head"]:
    """Return how alike heads attend: 1 minus the mean over queries of the total variation of their rows, so 1
    for equal patterns and 0 for heads that attend to different tokens.
    """
    rows = patterns.float().flatten(2)
    return 1 - 0.5 * torch.cdist(rows, rows, p=1).double() / patterns.shape[-2]
