"""What is minimised: the task's loss, and with it the disentanglement loss at one site of the model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.stimuli.discrimination import DiscriminationBatch
from vit_mechinterp.training.auxiliary import DisentanglementProbes

__all__ = ["Objective", "objective"]


class Objective(NamedTuple):
    """A loss to go down, and numbers for the log (detached)."""

    loss: Float[Tensor, ""]
    log: dict[str, float]


def objective(
    vit: HookedViT, probes: DisentanglementProbes, batch: DiscriminationBatch, *, weight: float, site: str
) -> Objective:
    """Compute ``cross-entropy(label) + weight * (cross-entropy(shape) + cross-entropy(color))`` on a batch.

    The probes read the tokens of both objects at ``site``, which holds one embedding per token, such as
    ``blocks.1.resid_post``. With a weight of 0 nothing is captured and the probes are not used.
    """
    device = vit.device
    labels = batch.labels().to(device)
    logits, cache = vit.run(batch.images().to(device), capture=[site] if weight else [])
    loss = functional.cross_entropy(logits, labels)
    numbers = {"task_loss": loss, "accuracy": (logits.argmax(-1) == labels).float().mean()}
    if weight:
        tokens = torch.from_numpy(batch.tokens).to(device) + len(vit.layout.tokens.prefix)
        shape, color = torch.from_numpy(batch.shape).to(device), torch.from_numpy(batch.color).to(device)
        terms = probes(cache[site], tokens, shape, color)
        loss = loss + weight * (terms.shape + terms.color)
        numbers |= {f"probe_{name}": value for name, value in terms._asdict().items()}
    return Objective(loss, {name: float(value.detach()) for name, value in numbers.items()})
