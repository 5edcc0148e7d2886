"""Trained rotations of pyvene's as subspaces of ours, and the other way round.

Both write ``h + (g * (v - h R)) R^T``: ``R [d, r]`` is the basis of `InjectSubspace`, ``g [r]`` its gate.
"""

from __future__ import annotations

from typing import Any

import pyvene as pv
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.errors import SpecError

__all__ = ["to_rotation", "to_subspace"]


@torch.no_grad()
def to_subspace(intervention: Any) -> dict[str, Tensor]:
    """Basis ``[d, r]`` and, where the intervention weighs dimensions, gate ``[r]``, as float32 on the CPU.

    Args:
        intervention: a `RotatedSpaceIntervention` (its first ``interchange_dim`` dimensions), a
            `LowRankRotatedSpaceIntervention`, a `BoundlessRotatedSpaceIntervention`, a
            `SigmoidMaskRotatedSpaceIntervention` or a `SigmoidMaskIntervention` of pyvene's.

    Raises:
        SpecError: it is another one, which is no weighted interchange in a linear subspace.
    """
    gate = None
    if isinstance(intervention, pv.SigmoidMaskIntervention):
        basis = torch.eye(len(intervention.mask))
        gate = torch.sigmoid(intervention.mask / intervention.temperature)
    elif isinstance(intervention, pv.LowRankRotatedSpaceIntervention):
        basis = intervention.rotate_layer.weight
    elif isinstance(intervention, pv.RotatedSpaceIntervention):
        weight = intervention.rotate_layer.weight
        first = intervention.interchange_dim
        basis = weight if first is None else weight[:, : int(first)]
    elif isinstance(intervention, pv.BoundlessRotatedSpaceIntervention):
        basis = intervention.rotate_layer.weight
        d = len(basis)
        last = torch.clamp(intervention.intervention_boundaries, 1e-3, 1)[0] * d
        places = torch.arange(d, device=basis.device)
        temperature = intervention.temperature
        gate = torch.sigmoid(places / temperature) * torch.sigmoid((last - places) / temperature)
    elif isinstance(intervention, pv.SigmoidMaskRotatedSpaceIntervention):
        basis = intervention.rotate_layer.weight
        gate = torch.sigmoid(intervention.masks / intervention.temperature)
    else:
        raise SpecError(
            f"{type(intervention).__name__} is no interchange in a linear subspace. Those are RotatedSpace, "
            "LowRankRotatedSpace, BoundlessRotatedSpace, SigmoidMaskRotatedSpace and SigmoidMask "
            "interventions."
        )
    found = {"basis": basis} if gate is None else {"basis": basis, "gate": gate}
    return {name: tensor.detach().float().cpu().clone() for name, tensor in found.items()}


@torch.no_grad()
def to_rotation(basis: Float[Tensor, "d r"], gate: Float[Tensor, " r"] | None = None) -> Any:
    """A pyvene intervention that does what `InjectSubspace` does with a source.

    Without a gate it is a `LowRankRotatedSpaceIntervention`; with one a
    `SigmoidMaskRotatedSpaceIntervention`, whose rotation is the basis and any complement of it, and whose
    mask is closed on the complement. The first works token by token, as here (``keep_last_dim``); their masks
    cannot, and take one token per example, ``[example, d]``.

    Raises:
        SpecError: the basis is no ``[d, r]``, or the gate is no ``[r]``.
    """
    fits = basis.ndim == 2 and basis.shape[1] <= basis.shape[0]
    if not fits or (gate is not None and gate.shape != basis.shape[1:]):
        shape = None if gate is None else tuple(gate.shape)
        raise SpecError(f"A basis is [d, r] and a gate [r]; got {tuple(basis.shape)} and {shape}.")
    d, r = basis.shape
    if gate is None:
        low = pv.LowRankRotatedSpaceIntervention(embed_dim=d, low_rank_dimension=r, keep_last_dim=True)
        low.rotate_layer.weight = basis.float()
        return low
    rest = torch.randn(d, d - r, generator=torch.Generator().manual_seed(0))
    filled = torch.cat([basis.float().cpu(), rest], dim=1)
    whole, sizes = torch.linalg.qr(filled)
    masked = pv.SigmoidMaskRotatedSpaceIntervention(embed_dim=d)
    masked.rotate_layer.weight = whole * sizes.diagonal().sign()  # QR may turn a column around
    opened = torch.full((d,), -1e4)
    opened[:r] = torch.logit(gate.float(), eps=1e-7).clamp(-1e4, 1e4)
    masked.masks.copy_(opened * masked.temperature)
    return masked
