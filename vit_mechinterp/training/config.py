"""What to train, on what, and how: one validated, frozen document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vit_mechinterp.stimuli.geometry import Geometry
from vit_mechinterp.training.pipeline import PipelineStage

__all__ = ["ModelConfig", "TrainingConfig"]


class ModelConfig(BaseModel):
    """Sizes of a timm ``VisionTransformer`` with a CLS token and learned positions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = Field(
        "vit_tiny_patch16_224",
        description="a timm VisionTransformer entry point with 16-px patches or as `patch_size`",
    )
    embed_dim: int = Field(128, gt=0, description="width of the residual stream")
    depth: int = Field(6, gt=0, description="blocks")
    num_heads: int = Field(4, gt=0, description="attention heads; divides embed_dim")


class TrainingConfig(BaseModel):
    """Training on one of the two tasks, every image new.

    With ``auxiliary_weight`` above 0 the disentanglement loss (see `auxiliary`) acts at ``auxiliary_site``;
    stages in ``pipeline`` add the pipeline loss (see `pipeline`). Without either the task is all there is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["discrimination", "rmts"] = Field(
        "discrimination", description="same or different, or relational match to sample"
    )
    model: ModelConfig = ModelConfig()
    initial: str | None = Field(
        None, description="model to start from, as load takes it, of the same sizes; None: random weights"
    )
    canvas: int = Field(128, gt=0, description="side of the images in pixels")
    patch: int = Field(16, gt=0, description="side of a patch in pixels")
    cell: int = Field(32, gt=0, description="side of an object's cell in pixels")
    combinations: str = Field("256-256-256", description="objects of the splits: 256-256-256 or 32-32-224")

    auxiliary_weight: float = Field(
        1.0, ge=0, description="weight of the disentanglement loss; 0 turns it off"
    )
    auxiliary_site: str = Field("blocks.1.resid_post", description="site whose object tokens the probes read")

    pipeline: tuple[PipelineStage, ...] = Field((), description="stages of the pipeline loss; none: no loss")
    pipeline_weight: float = Field(1.0, ge=0, description="weight of the pipeline loss")

    steps: int = Field(4500, gt=0, description="optimiser steps")
    batch_size: int = Field(64, gt=1, description="images a step")
    learning_rate: float = Field(5e-4, gt=0, description="peak of the one-cycle schedule")
    warmup: float = Field(0.15, gt=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    seed: int = Field(0, ge=0, description="seed of the weights and of the images")

    validate_every: int = Field(
        250, gt=0, description="steps between validations; the best checkpoint is kept"
    )
    validation_images: int = Field(
        1024, gt=1, description="held-out images of each validation, the same every time"
    )
    test_images: int = Field(6400, gt=1, description="images of the evaluation on each test split at the end")
    log_every: int = Field(50, gt=0, description="steps between lines of the log")
    device: Literal["auto", "cpu"] = Field("auto", description="auto takes an accelerator if there is one")
    threads: int | None = Field(None, gt=0, description="CPU threads; None leaves torch's own choice")

    @property
    def geometry(self) -> Geometry:
        """The geometry of the images."""
        return Geometry(self.canvas, self.patch, self.cell)
