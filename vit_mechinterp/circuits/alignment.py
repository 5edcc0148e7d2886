"""Subspaces found by gradient descent: a rotation and a gate per place, trained so that putting a source's
coordinates into them changes the model's decision as a counterfactual label says.

The method is distributed alignment search (Geiger et al. 2024) with the learned gate of Lepori et al. 2024,
whose module reads, for base activation ``b`` and source activation ``s``::

    out = [(1 - g) * (b R) + g * (s R)] R^T,    R orthogonal [d, d],    g = sigmoid(m / T)

That is what `InjectSubspace` computes with ``basis=R`` and ``gate=g``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from vit_mechinterp.circuits.training_settings import check_settings
from vit_mechinterp.errors import SpecError, suggest

__all__ = [
    "GatedRotations",
    "Permutation",
    "Schedule",
    "Training",
    "gate_name",
    "learning_rate_factor",
    "rotation_name",
    "temperature",
]

Permutation = Literal["batch", "example"]
Schedule = Literal["exact", "authors"]

LOWEST_TEMPERATURE = 1 / 200


@dataclass(frozen=True)
class Training:
    """How subspaces are trained; the defaults are the settings of Lepori et al. 2024.

    Attributes:
        epochs: passes over the training data.
        batch_size: examples per step.
        learning_rate, mask_learning_rate: Adam's, for R and for m; both rise linearly over the first tenth of
            the steps and then fall linearly to zero.
        sparsity: weight of the sum of each gate in the loss.
        permute_sources: pair the tokens of source and base in another random order in every batch, so that a
            subspace cannot rest on where in an object a token lies.
        permutation: one such order for each ``"batch"``, as published, or for each ``"example"``.
        schedule: ``"exact"``, or ``"authors"`` for the published code's rounding (see `temperature` and
            `learning_rate_factor`).
        tied: one rotation and gate for all tokens of an object, as published; or one for each of them, in the
            order of the base's tokens.
        seed: of the first rotations, the batches and the orders.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3
    mask_learning_rate: float = 1e-2
    sparsity: float = 1e-3
    permute_sources: bool = True
    permutation: Permutation = "batch"
    schedule: Schedule = "exact"
    tied: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self, ("epochs", "batch_size"), ("learning_rate", "mask_learning_rate", "sparsity", "seed")
        )
        for name, known in (("permutation", get_args(Permutation)), ("schedule", get_args(Schedule))):
            if (value := getattr(self, name)) not in known:
                near = suggest(value, known)
                raise SpecError(f"{name}={value!r} is not known. Choose one of: {', '.join(known)}.{near}")


def rotation_name(layer: int) -> str:
    """The name under which a spec refers to a layer's rotation."""
    return f"rotation_{layer}"


def gate_name(layer: int) -> str:
    """The name under which a spec refers to a layer's gate."""
    return f"gate_{layer}"


def temperature(epoch: int, epochs: int, schedule: Schedule = "exact") -> float:
    """The gates' temperature T: 1 in the first epoch, 1/200 in the last, falling geometrically in between
    (Lepori et al. 2024); in a training of one epoch, 1.

    With ``"authors"``, 1/T and T are rounded to bfloat16, as in the published code.
    """
    if epochs < 2:
        return 1.0
    heat = float(LOWEST_TEMPERATURE ** (epoch / (epochs - 1)))
    if schedule == "exact":
        return heat
    inverse = (1 / LOWEST_TEMPERATURE) ** (torch.tensor(epoch) / (epochs - 1))
    return float(1 / inverse.to(torch.bfloat16))


def learning_rate_factor(step: int, steps: int, schedule: Schedule = "exact") -> float:
    """The learning rate's factor: linear warm-up over a tenth of the steps, then linear decay to zero.

    With ``"authors"`` the warm-up begins at zero, so that the first step moves nothing, as with
    ``get_linear_schedule_with_warmup`` of transformers.
    """
    if schedule == "authors":
        rise = 0.1 * steps
        return step / max(1.0, rise) if step < rise else max(0.0, (steps - step) / max(1.0, steps - rise))
    warmup = max(1, round(0.1 * steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (steps - step) / max(1, steps - warmup))


class GatedRotations(nn.Module):
    """Independent rotations and gates: one of each for every entry of ``layers``.

    All rotations are one stacked parameter, so that the orthogonal map and the optimizer run once for all of
    them. The map is Cayley's around the first rotation: equal to the matrix exponential (the default of
    torch) up to second order, and of no weight beside the forwards.

    Args:
        layers: the layer of each entry; several entries may have one layer, if their prefixes differ.
        d: size of the activation.
        seed: of the first rotations, drawn uniformly from the orthogonal matrices; one for each entry, or one
            for all. An entry's first rotation depends on its seed and its layer alone.
        prefixes: what the names of each entry's tensors begin with; nothing by default.
        n_tokens: give each of so many tokens a rotation and a gate of its own; one for all if left out.

    Attributes:
        rotation: ``[entry, d, d]`` or ``[entry, token, d, d]``, orthogonal at every step.
        mask: ``[entry, d]`` or ``[entry, token, d]``, the gates before the sigmoid; 0 at first, so that every
            gate is half open.
    """

    rotation: Tensor

    def __init__(
        self,
        layers: Sequence[int],
        d: int,
        seed: int | Sequence[int] = 0,
        prefixes: Sequence[str] | None = None,
        n_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.prefixes = ("",) * len(self.layers) if prefixes is None else tuple(prefixes)
        seeds = [seed] * len(self.layers) if isinstance(seed, int) else seed
        first = [_rotations(d, own, layer, n_tokens) for own, layer in zip(seeds, self.layers, strict=True)]
        self.register_parameter("rotation", nn.Parameter(torch.stack(first)))
        self.mask = nn.Parameter(torch.zeros(self.rotation.shape[:-1]))
        parametrizations.orthogonal(self, "rotation", orthogonal_map="cayley")

    def gates(self, temperature: float) -> Float[Tensor, "entry *token d"]:
        """``sigmoid(m / T)``."""
        return torch.sigmoid(self.mask / temperature)

    def binary_gates(self) -> Float[Tensor, "entry *token d"]:
        """The limit of `gates` for T to 0: 1 where m is positive, else 0."""
        return (self.mask > 0).to(self.mask.dtype)

    def tensors(self, gates: Float[Tensor, "entry *token d"]) -> dict[str, Tensor]:
        """Rotations and gates by name; gradients flow through them."""
        named: dict[str, Tensor] = {}
        entries = zip(self.prefixes, self.layers, self.rotation.unbind(), gates.unbind(), strict=True)
        for prefix, layer, rotation, gate in entries:
            named[prefix + rotation_name(layer)] = rotation
            named[prefix + gate_name(layer)] = gate
        return named


def _rotations(d: int, seed: int, layer: int, n_tokens: int | None) -> Float[Tensor, "*token d d"]:
    if n_tokens is None:
        return _rotation(d, (seed, 1, layer))
    return torch.stack([_rotation(d, (seed, 1, layer, token)) for token in range(n_tokens)])


def _rotation(d: int, path: tuple[int, ...]) -> Float[Tensor, "d d"]:
    gaussian = np.random.default_rng(path).standard_normal((d, d))
    q, r = np.linalg.qr(gaussian)
    return torch.from_numpy((q * np.sign(np.diagonal(r))).astype(np.float32))
