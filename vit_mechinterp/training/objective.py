"""What is minimised: the task's loss, and with it the auxiliary losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.stimuli.batches import TaskBatch
from vit_mechinterp.training.config import TrainingConfig
from vit_mechinterp.training.pipeline import active, pipeline_loss

__all__ = ["Objective", "objective", "token_positions"]


class Objective(NamedTuple):
    """A loss to go down, and numbers for the log (detached scalars on the model's device)."""

    loss: Float[Tensor, ""]
    log: dict[str, Tensor]


def token_positions(
    vit: HookedViT, patches: Int64[Tensor, "batch object patch"]
) -> Int64[Tensor, "batch object patch"]:
    """Turn patch indices (``TaskBatch.tokens``, ``object_k_tokens``) into positions on the token axis of a
    model, on its device: prefix tokens come first.
    """
    return torch.as_tensor(patches).to(vit.device) + len(vit.layout.tokens.prefix)


def objective(
    vit: HookedViT,
    probes: nn.Module | None,
    batch: TaskBatch,
    config: TrainingConfig,
    step: int = 0,
) -> Objective:
    """Compute the task's cross-entropy on a batch, plus the auxiliary losses that are on at this step.

    The probes read the tokens of all objects at ``config.auxiliary_site``, which holds one embedding per
    token; the pipeline loss reads the attention patterns of its stages. What no loss reads is not captured.
    With a weight of 0 the probes are not used, and None can stand for them.
    """
    device = vit.device
    labels = batch.labels().to(device)
    stages = active(config.pipeline, step) if config.pipeline_weight else ()
    sites = [config.auxiliary_site] if config.auxiliary_weight else []
    sites += dict.fromkeys(site for stage in stages for site in stage.sites)
    logits, cache = vit.run(_images(batch, device), capture=sites)
    # The losses themselves are computed in float32, whatever precision the model runs in.
    with torch.autocast(device.type, enabled=False):
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels)
        numbers = {"task_loss": loss, "accuracy": (logits.argmax(-1) == labels).float().mean()}
        tokens = token_positions(vit, torch.from_numpy(batch.tokens))
        if config.auxiliary_weight:
            assert probes is not None
            shape, color = torch.from_numpy(batch.shape).to(device), torch.from_numpy(batch.color).to(device)
            terms = probes(cache[config.auxiliary_site].float(), tokens, shape, color)
            loss = loss + config.auxiliary_weight * terms.total
            numbers |= terms.log()
        if stages:
            pipeline = pipeline_loss(cache, tokens, stages)
            loss = loss + config.pipeline_weight * pipeline
            numbers["pipeline_loss"] = pipeline
    return Objective(loss, {name: value.detach() for name, value in numbers.items()})


def _images(batch: TaskBatch, device: torch.device) -> Float[Tensor, "image channel height width"]:
    """The batch's images on a device; bytes travel to an accelerator, a quarter of the floats."""
    if device.type == "cpu":
        return batch.images()
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1)
        for values in (batch.normalization.mean, batch.normalization.std)
    )
    return torch.from_numpy(batch.pixels).to(device).float().div_(255).sub_(mean).div_(std)
