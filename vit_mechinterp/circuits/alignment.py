"""Subspaces found by gradient descent: a rotation and a gate per place, trained so that putting a source's
coordinates into them changes the model's decision as a counterfactual label says.

The method is distributed alignment search (Geiger et al. 2024) with the learned gate of Lepori et al. 2024,
whose module reads, for base activation ``b`` and source activation ``s``::

    out = [(1 - g) * (b R) + g * (s R)] R^T,    R orthogonal [d, d],    g = sigmoid(m / T)

That is what `InjectSubspace` computes with ``basis=R`` and ``gate=g``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from tqdm.auto import tqdm

from vit_mechinterp.engine import Prepared, prepare
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model import HookedViT
from vit_mechinterp.spec import Run

__all__ = [
    "GatedRotations",
    "Trained",
    "Training",
    "gate_name",
    "rotation_name",
    "temperature",
    "train_subspaces",
]

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
        seed: of the first rotations, the batches and the orders.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3
    mask_learning_rate: float = 1e-2
    sparsity: float = 1e-3
    permute_sources: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name}={getattr(self, name)}: training takes at least 1.")
        for name in ("learning_rate", "mask_learning_rate", "sparsity", "seed"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name}={getattr(self, name)} is negative; it must be 0 or more.")


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        tensors: ``rotation_<layer>`` ``[d, d]`` and ``gate_<layer>`` ``[d]``, the gates binary.
        losses: mean loss of each layer over the last epoch, penalty included.
        steps: number of optimizer steps.
        clean_evaluations: (row, block) pairs of clean forwards; they do not depend on the number of steps.
        provenance: what `Prepared.provenance` says.
    """

    tensors: Mapping[str, Tensor]
    losses: Mapping[int, float]
    steps: int
    clean_evaluations: int
    provenance: Mapping[str, Any]


def rotation_name(layer: int) -> str:
    """The name under which a spec refers to a layer's rotation."""
    return f"rotation_{layer}"


def gate_name(layer: int) -> str:
    """The name under which a spec refers to a layer's gate."""
    return f"gate_{layer}"


def temperature(epoch: int, epochs: int) -> float:
    """The gates' temperature T: 1 in the first epoch, 1/200 in the last, falling geometrically in between
    (Lepori et al. 2024); in a training of one epoch, 1.
    """
    return float(LOWEST_TEMPERATURE ** (epoch / (epochs - 1))) if epochs > 1 else 1.0


class GatedRotations(nn.Module):
    """A rotation and a gate for each of several layers, independent of one another.

    All rotations are one batched parameter, so that the orthogonal map runs once for all layers. It is the
    Cayley map around the first rotation: equal to the matrix exponential (the default of torch) up to second
    order, and of no weight beside the forwards.

    Args:
        layers: each layer's first rotation depends on the seed and on the layer's own number alone.
        d: size of the activation.
        seed: of the first rotations, drawn uniformly from the orthogonal matrices.

    Attributes:
        rotation: ``[layer, d, d]``, orthogonal at every step.
        mask: ``[layer, d]``, the gates before the sigmoid; 0 at first, so that every gate is half open.
    """

    rotation: Tensor

    def __init__(self, layers: Sequence[int], d: int, seed: int = 0) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.register_parameter(
            "rotation", nn.Parameter(torch.stack([_rotation(d, seed, n) for n in layers]))
        )
        self.mask = nn.Parameter(torch.zeros(len(self.layers), d))
        parametrizations.orthogonal(self, "rotation", orthogonal_map="cayley")

    def gates(self, temperature: float) -> Float[Tensor, "layer d"]:
        """``sigmoid(m / T)``."""
        return torch.sigmoid(self.mask / temperature)

    def binary_gates(self) -> Float[Tensor, "layer d"]:
        """The limit of `gates` for T to 0: 1 where m is positive, else 0."""
        return (self.mask > 0).to(self.mask.dtype)

    def tensors(self, gates: Float[Tensor, "layer d"]) -> dict[str, Tensor]:
        """Rotations and gates by name; gradients flow through them."""
        rotation = self.rotation
        named = {rotation_name(layer): rotation[n] for n, layer in enumerate(self.layers)}
        return named | {gate_name(layer): gates[n] for n, layer in enumerate(self.layers)}


def _rotation(d: int, seed: int, layer: int) -> Tensor:
    gaussian = np.random.default_rng((seed, 1, layer)).standard_normal((d, d))
    q, r = np.linalg.qr(gaussian)
    return torch.from_numpy((q * np.sign(np.diagonal(r))).astype(np.float32))


def train_subspaces(
    vit: HookedViT,
    runs: Mapping[int, Run],
    data: Any,
    labels: Int[Tensor, " example"],
    d: int,
    training: Training,
    *,
    name: str = "subspaces",
    progress: bool = True,
) -> Trained:
    """Train one subspace per layer, all of them in the same growing batches.

    The loss is the sum over layers of ``CE(logits, label) + sparsity * sum(g)``. No two layers share a
    parameter, so each is trained as if it were alone.

    Args:
        vit: the model; it is frozen.
        runs: by layer, a run whose one intervention names the layer's tensors (`rotation_name`, `gate_name`).
        data: the training examples.
        labels: the class that each example should get under the intervention.
        d: size of the activation at the site.
        training: the settings.
        name: what the progress bar says.
        progress: show bars if it takes longer than two seconds.

    Raises:
        SpecError, DataError: before the first forward, if anything does not fit.
    """
    modules = GatedRotations(list(runs), d, training.seed).to(vit.device)
    first = {key: tensor.detach() for key, tensor in modules.tensors(modules.gates(1.0)).items()}
    with prepare(vit, list(runs.values()), data, first, progress=progress) as prepared:
        losses, steps = _descend(prepared, modules, labels.to(vit.device), training, name, progress)
        with torch.no_grad():
            tensors = {
                key: x.cpu().contiguous() for key, x in modules.tensors(modules.binary_gates()).items()
            }
        return Trained(
            tensors=tensors,
            losses=dict(zip(runs, losses.tolist(), strict=True)),
            steps=steps,
            clean_evaluations=prepared.clean_evaluations,
            provenance=prepared.provenance(),
        )


def _descend(
    prepared: Prepared, modules: GatedRotations, labels: Tensor, training: Training, name: str, progress: bool
) -> tuple[Tensor, int]:
    """Train in place; the mean loss of every layer over the last epoch, and the number of steps."""
    n = prepared.n_examples
    steps = training.epochs * -(-n // training.batch_size)
    parameters = dict(modules.named_parameters())
    mask = parameters.pop("mask")
    optimizer = torch.optim.Adam(
        [
            {"params": list(parameters.values()), "lr": training.learning_rate},
            {"params": [mask], "lr": training.mask_learning_rate},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    random = np.random.default_rng((training.seed, 0))
    losses = torch.zeros(len(modules.layers))
    with (
        torch.enable_grad(),
        tqdm(total=steps, desc=name, unit="step", delay=2.0, disable=not progress) as bar,
    ):
        for epoch in range(training.epochs):
            losses.zero_()
            order = random.permutation(n)
            for start in range(0, n, training.batch_size):
                batch = order[start : start + training.batch_size].tolist()
                pairing = random.permutation(prepared.most_source_tokens).tolist()
                gates = modules.gates(temperature(epoch, training.epochs))
                logits = prepared(
                    batch, modules.tensors(gates), pairing if training.permute_sources else None
                )
                loss = _cross_entropy(logits, labels[batch]) + training.sparsity * gates.sum(dim=1)
                optimizer.zero_grad()
                torch.autograd.backward(loss.sum())
                optimizer.step()
                schedule.step()
                losses += loss.detach().cpu() * (len(batch) / n)
                bar.update()
    return losses, steps


def _cross_entropy(logits: Tensor, labels: Tensor) -> Float[Tensor, " run"]:
    each = functional.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
    return each.view(len(logits), -1).mean(dim=1)


def _rate(step: int, steps: int) -> float:
    """The learning rate's factor: linear warm-up over a tenth of the steps, then linear decay to zero."""
    warmup = max(1, round(0.1 * steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (steps - step) / max(1, steps - warmup))
