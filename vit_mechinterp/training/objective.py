"""What is minimised: the task's loss, and with it the auxiliary losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.stimuli.batches import TaskBatch
from vit_mechinterp.training.auxiliary import DisentanglementProbes
from vit_mechinterp.training.config import TrainingConfig
from vit_mechinterp.training.pipeline import active, pipeline_loss

__all__ = ["Objective", "objective"]


class Objective(NamedTuple):
    """A loss to go down, and numbers for the log (detached)."""

    loss: Float[Tensor, ""]
    log: dict[str, float]


def objective(
    vit: HookedViT,
    probes: DisentanglementProbes,
    batch: TaskBatch,
    config: TrainingConfig,
    step: int = 0,
) -> Objective:
    """Compute the task's cross-entropy on a batch, plus the auxiliary losses that are on at this step.

    The disentanglement probes read the tokens of all objects at ``config.auxiliary_site``, which holds one
    embedding per token; the pipeline loss reads the attention patterns of its stages. What no loss reads is
    not captured, and the probes are not used with a weight of 0.
    """
    device = vit.device
    labels = batch.labels().to(device)
    stages = active(config.pipeline, step) if config.pipeline_weight else ()
    sites = [config.auxiliary_site] if config.auxiliary_weight else []
    sites += dict.fromkeys(site for stage in stages for site in stage.sites)
    logits, cache = vit.run(batch.images().to(device), capture=sites)
    loss = functional.cross_entropy(logits, labels)
    numbers = {"task_loss": loss, "accuracy": (logits.argmax(-1) == labels).float().mean()}
    tokens = torch.from_numpy(batch.tokens).to(device) + len(vit.layout.tokens.prefix)
    if config.auxiliary_weight:
        shape, color = torch.from_numpy(batch.shape).to(device), torch.from_numpy(batch.color).to(device)
        terms = probes(cache[config.auxiliary_site], tokens, shape, color)
        loss = loss + config.auxiliary_weight * (terms.shape + terms.color)
        numbers |= {f"probe_{name}": value for name, value in terms._asdict().items()}
    if stages:
        pipeline = pipeline_loss(cache, tokens, stages)
        loss = loss + config.pipeline_weight * pipeline
        numbers["pipeline_loss"] = pipeline
    return Objective(loss, {name: float(value.detach()) for name, value in numbers.items()})
