"""The pipeline loss: chosen heads are to attend within objects, then within pairs, then between pairs (Lepori
et al. 2024).

For token sets X and Y, ``s(X -> Y)`` is the mean over the queries in X of the attention that they pay to the
keys in Y. A stage names layers, heads and one of three scores, each a mean of such terms:

* ``within_object``: every object to itself;
* ``within_pair``: every object to its partner;
* ``between_pairs``: every object to each object of the other pair (relational match to sample alone).

The loss of a layer is the mean of ``-log(score)`` over images and heads, and the pipeline loss the mean over
all layers of the stages that are on. The authors' code divides scores by four times the number of queries,
which adds log 4 to the loss of four-token objects and leaves the gradients as they are; there is no such
factor here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from vit_mechinterp.errors import SpecError

__all__ = ["PipelineStage", "active", "object_attention", "pipeline_loss", "stage_score"]

_SMALLEST = 1e-12
"""Below this a score counts as this, so that a head without any such attention has a finite loss."""


class PipelineStage(BaseModel):
    """One stage of the pipeline loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: Literal["within_object", "within_pair", "between_pairs"] = Field(
        description="what the heads are to attend to"
    )
    layers: tuple[int, ...] = Field(min_length=1, description="blocks")
    heads: tuple[int, ...] | None = Field(
        None, min_length=1, description="heads of these blocks; None means all"
    )
    first_step: int = Field(0, ge=0, description="step at which the stage is switched on")
    last_step: int | None = Field(None, gt=0, description="step at which it is switched off; None: never")

    @model_validator(mode="after")
    def _is_on(self) -> PipelineStage:
        if self.last_step is not None and self.last_step <= self.first_step:
            raise ValueError(
                f"the stage {self.attention} is switched off at step {self.last_step} and on at step "
                f"{self.first_step}, so it would never act: set last_step above first_step"
            )
        return self

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that the stage reads."""
        return tuple(f"blocks.{layer}.attn.pattern" for layer in self.layers)


def active(stages: Sequence[PipelineStage], step: int) -> tuple[PipelineStage, ...]:
    """Return the stages that are on at a step of training."""
    return tuple(
        stage
        for stage in stages
        if stage.first_step <= step and (stage.last_step is None or step < stage.last_step)
    )


def object_attention(
    pattern: Float[Tensor, "batch head query key"], tokens: Int64[Tensor, "batch object patch"]
) -> Float[Tensor, "batch head object object"]:
    """Return ``s(X -> Y)`` for every pair of objects; row X, column Y.

    Args:
        pattern: attention patterns.
        tokens: positions of each object's tokens along the token axis (prefix tokens counted).
    """
    members = torch.zeros(*tokens.shape[:2], pattern.shape[-1], dtype=pattern.dtype, device=pattern.device)
    members = members.scatter(2, tokens, 1.0)
    total = torch.einsum("box,bhxy,bpy->bhop", members, pattern, members)
    return total / members.sum(dim=-1)[:, None, :, None]


def stage_score(
    attention: Float[Tensor, "batch head object object"], kind: str
) -> Float[Tensor, "batch head"]:
    """Return the score of one stage; objects 2p and 2p + 1 are partners.

    Raises:
        SpecError: ``between_pairs`` with a single pair.
    """
    objects = torch.arange(attention.shape[-1], device=attention.device)
    same_pair = objects[:, None] // 2 == objects[None, :] // 2
    itself = objects[:, None] == objects[None, :]
    wanted = {
        "within_object": itself,
        "within_pair": same_pair & ~itself,
        "between_pairs": ~same_pair,
    }[kind]
    if not bool(wanted.any()):
        raise SpecError(
            "The images show one pair of objects, so no attention passes between pairs: leave out the stage "
            "between_pairs, or train on rmts."
        )
    return attention[:, :, wanted].mean(dim=-1)


def pipeline_loss(
    patterns: Mapping[str, Float[Tensor, "batch head query key"]],
    tokens: Int64[Tensor, "batch object patch"],
    stages: Sequence[PipelineStage],
) -> Float[Tensor, ""]:
    """Return the pipeline loss of the given stages.

    Args:
        patterns: attention patterns by site, at least those that the stages read.
        tokens: positions of each object's tokens along the token axis (prefix tokens counted).
        stages: the stages that are on, at least one.
    """
    losses = []
    for stage in stages:
        for site in stage.sites:
            # The logarithm of a small share needs more digits than mixed precision has.
            pattern = patterns[site].to(torch.promote_types(patterns[site].dtype, torch.float32))
            pattern = pattern if stage.heads is None else pattern[:, list(stage.heads)]
            score = stage_score(object_attention(pattern, tokens), stage.attention)
            losses.append(-score.clamp_min(_SMALLEST).log().mean())
    return torch.stack(losses).mean()
