"""First-order approximations: activations of two images, and the metric's gradient at one, at many sites.

Gradients come from ordinary forwards with hooks that keep what passes at each site. Integrated gradients
average them on the straight line between the two images' embeddings (Sundararajan et al. 2017; for edges of
a circuit Hanna et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.bound_metric import BoundMetric, Checked, bind_metric
from vit_mechinterp.circuits.kept_readings import KeptReadings, in_batches
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT

__all__ = [
    "Method",
    "Pulled",
    "check_gradient",
    "check_slopes",
    "differences",
    "gradients_at",
    "keeping",
    "linearised",
]

Method: TypeAlias = Literal["gradient", "integrated"]

Pull: TypeAlias = Callable[[Mapping[str, Tensor], Tensor], Mapping[Any, Tensor]]
"""From kept activations and the summed metric to gradients, by whatever key."""


@dataclass(frozen=True)
class Pulled:
    """Some examples of both images.

    Attributes:
        examples: which.
        change: site to the activation of the image patched from minus that of the image patched into.
        gradients: what was pulled, averaged over the points of the path.
    """

    examples: Sequence[int]
    change: Mapping[str, Tensor]
    gradients: Mapping[Any, Tensor]


def check_gradient(metric: BoundMetric, outputs: Float[Tensor, "example *output"]) -> None:
    """Raise SpecError unless the metric has a finite gradient at these outputs."""
    slope = _slope(metric, outputs)
    if slope is None:
        raise SpecError(
            f"The metric {metric.name} has no gradient, so nothing can be attributed to first order. Take "
            "logit_difference, probability, log_probability, kl or cosine, or patch exactly."
        )
    if not bool(slope.isfinite().all()):
        raise SpecError(f"The gradient of the metric {metric.name} is not finite on the images' outputs.")


def _slope(metric: BoundMetric, outputs: Float[Tensor, "example *output"]) -> Tensor | None:
    leaf = outputs.detach().double().requires_grad_()
    with torch.enable_grad():
        values = metric(leaf)
    if not values.requires_grad:
        return None
    slope: Tensor | None = torch.autograd.grad(values.sum(), leaf, allow_unused=True)[0]
    return slope


def check_slopes(metric: Checked, vit: HookedViT, data: Any, sites: Sequence[str]) -> None:
    """Refuse a metric or a site that no gradient reaches, by one blank image, before the images' forwards.

    Raises:
        SpecError: which it is.
    """
    kept: dict[str, Tensor] = {}
    with torch.enable_grad(), vit.hooks({site: keeping(kept, site) for site in sites}):
        outputs = vit(vit.blank(1).requires_grad_().clone())
        gradients_at(kept, outputs.double().square().sum())
    blank = outputs.detach().cpu().expand(Data(data, vit).n, *outputs.shape[1:])
    try:
        bound = bind_metric(metric, vit, data, blank, blank)
    except SpecError:
        return  # what cannot be read off blank images is tried on the images themselves
    if _slope(bound, blank) is None:
        check_gradient(bound, blank)


def keeping(kept: dict[str, Tensor], site: str) -> Callable[[Tensor], Tensor]:
    """Return the hook that keeps what passes at a site, with its graph."""

    def keep(value: Tensor) -> Tensor:
        kept[site] = value
        return value

    return keep


def gradients_at(kept: Mapping[str, Tensor], total: Tensor) -> dict[str, Tensor]:
    """Pull the gradient at every kept site.

    Raises:
        SpecError: a site has no gradient.
    """
    slopes = torch.autograd.grad(total, list(kept.values()), allow_unused=True, retain_graph=True)
    without = [site for site, slope in zip(kept, slopes, strict=True) if slope is None]
    if without:
        raise SpecError(
            f"No gradient arrives at {', '.join(without[:4])}: the output does not depend on "
            f"{'it' if len(without) == 1 else 'them'} through anything that can be differentiated. Leave "
            f"{'it' if len(without) == 1 else 'them'} out, or patch exactly."
        )
    return {site: slope for site, slope in zip(kept, slopes, strict=True) if slope is not None}


def differences(
    vit: HookedViT, data: Any, sites: Sequence[str], into: str, origin: str, examples: Sequence[int]
) -> dict[str, Tensor]:
    """Return, per site, the activation of image ``origin`` minus that of image ``into``."""
    columns = Data(data, vit)
    with torch.no_grad():
        _, here = vit.run(columns.images(into, examples), capture=sites)
        _, there = vit.run(columns.images(origin, examples), capture=sites)
    return {site: there[site] - here[site] for site in here}


def linearised(
    vit: HookedViT,
    data: Any,
    metric: BoundMetric,
    outputs: Float[Tensor, "example *output"],
    reduce: Callable[[Pulled], Float[Tensor, "cell batch"]],
    *,
    read: Sequence[str],
    kept: Sequence[str],
    pull: Pull = gradients_at,
    into: str = "base",
    origin: str = "source",
    method: Method = "gradient",
    steps: int = 8,
    cells: Sequence[Any] = (),
    folder: str | Path | None = None,
    progress: bool = True,
) -> Float[Tensor, "cell example"]:
    """Pull gradients at one image of every pair or on the way between both, and reduce them to numbers.

    Args:
        vit: the model.
        data: both images of every example.
        metric: what is differentiated.
        outputs: outputs of all examples, to complete a batch by: a metric sees all examples at once.
        reduce: makes numbers ``[cell, batch]`` of what was pulled for a few examples.
        read: sites whose change between the images is wanted.
        kept: sites whose activations the gradient is pulled at.
        pull: pulls gradients from the kept activations and the summed metric.
        into: the column of images where the gradient is taken.
        origin: the column of images that is patched from.
        method: ``"gradient"`` takes it at ``into``, ``"integrated"`` at the middles of ``steps`` equal pieces
            of the line between the embeddings of both.
        steps: number of pieces.
        cells: what the numbers are of, as `KeptReadings` takes what decides them.
        folder: keeps the numbers, so that the same call goes on where it was stopped.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        SpecError: a site or the metric has no gradient, or ``steps`` is none.
    """
    if method not in ("gradient", "integrated"):
        raise SpecError(f"method={method!r} is not known. Choose 'gradient' or 'integrated'.")
    if steps < 1:
        raise SpecError(f"steps={steps} must be a positive number.")
    check_gradient(metric, outputs)
    columns = Data(data, vit)
    points = [(step + 0.5) / steps for step in range(steps)] if method == "integrated" else [None]

    def numbers(examples: list[int]) -> dict[str, Tensor]:
        change = differences(vit, data, list(dict.fromkeys(["embed", *read])), into, origin, examples)
        sums: dict[Any, Tensor] = {}
        pixels = columns.images(into, examples)
        for point in points:
            shift = None if point is None else point * change["embed"]
            for key, slope in _pulled(vit, pixels, shift, metric, outputs, examples, kept, pull).items():
                sums[key] = sums[key] + slope if key in sums else slope
        pulled = Pulled(examples, change, {key: total / len(points) for key, total in sums.items()})
        return {"numbers": reduce(pulled)}

    decided: dict[str, Any] = {
        "cells": list(cells), "into": into, "points": points,
        # A function has no digest; its numbers tell metrics apart, and it sees the outputs of all examples.
        "metric": [metric.name, metric.description, metric.clean, metric.other], "outputs": outputs,
    }  # fmt: skip
    with KeptReadings(folder, vit, columns, [into, origin], reading="gradients", **decided) as store:
        batches = in_batches(vit, columns.n, numbers, store, progress=progress, what="gradients")
        return torch.cat([found["numbers"].cpu() for _, found in batches], dim=1)


def _pulled(
    vit: HookedViT,
    pixels: Tensor,
    shift: Tensor | None,
    metric: BoundMetric,
    outputs: Tensor,
    examples: Sequence[int],
    kept: Sequence[str],
    pull: Pull,
) -> Mapping[Any, Tensor]:
    activations: dict[str, Tensor] = {}

    def keeping(site: str) -> Callable[[Tensor], Tensor]:
        def keep(value: Tensor) -> Tensor:
            if site == "embed" and shift is not None:
                value = value + shift
            activations[site] = value
            return value

        return keep

    visitors = {site: keeping(site) for site in dict.fromkeys(["embed", *kept])}
    with torch.enable_grad(), vit.hooks(visitors):
        # Without a leaf that needs a gradient a model with frozen parameters would build no graph.
        found = vit(pixels.detach().clone().requires_grad_().clone())
        whole = outputs.to(found.device, torch.float64).index_copy(
            0, torch.tensor(examples, device=found.device), found.double()
        )
        total = metric(whole)[examples].sum()
        return {k: v.detach() for k, v in pull({site: activations[site] for site in kept}, total).items()}
