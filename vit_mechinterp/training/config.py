"""What to train, on what, and how: one validated, frozen document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from vit_mechinterp.stimuli.geometry import Geometry
from vit_mechinterp.training.pipeline import PipelineStage

__all__ = ["EVALUATION_SPLITS", "EvaluationSplit", "ModelConfig", "TrainingConfig"]

EvaluationSplit = Literal["train", "val", "test_iid", "test", "ood-shape", "ood-color", "ood-shape-color"]
EVALUATION_SPLITS: tuple[EvaluationSplit, ...] = (
    "train",
    "val",
    "test_iid",
    "test",
    "ood-shape",
    "ood-color",
    "ood-shape-color",
)
"""What a model can be evaluated on: the images that it was trained on, new images of the objects that it was
trained on ("val", "test_iid"), of the objects held out of its training ("test"; with all 256 objects in
training these are new images again), and objects of shapes, colours or both that no training shows."""

_AUTHORS_PROBES = {"cls": "pair-relation", "control": "object-identity"}
"""What the code of Lepori et al. calls them."""


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

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}")
        return self


class TrainingConfig(BaseModel):
    """Training on one of the two tasks.

    The model is a small ViT by its sizes, or any model that `vit_mechinterp.load` takes, given a two-way head
    (see `heads`). Images are always new, or shuffled from a set of ``train_images``. With
    ``auxiliary_weight`` above 0 the disentanglement loss (see `auxiliary`) acts at ``auxiliary_site``;
    stages in ``pipeline`` add the pipeline loss (see `pipeline`). Without either the task is all there is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    task: Literal["discrimination", "rmts"] = Field(
        "discrimination", description="same or different, or relational match to sample"
    )
    model: ModelConfig | str = Field(
        ModelConfig(), description="sizes of a small ViT, or a model string as load takes it"
    )
    pretrained: bool = Field(True, description="whether a model given by its string comes with its weights")
    model_options: dict[str, JsonValue] = Field(
        default_factory=dict, description="options of load for a model given by its string"
    )
    fresh_positions: bool = Field(
        False,
        description="draw new position embeddings for the canvas where the model would interpolate its own; "
        "what the authors' code does to DINOv2",
    )
    preset: str | None = Field(None, description="the preset that these settings were taken from")
    initial: str | None = Field(
        None, description="model to start from, as load takes it, of the same sizes; None: as `model` says"
    )
    canvas: int = Field(128, gt=0, description="side of the images in pixels")
    patch: int = Field(16, gt=0, description="side of a patch in pixels")
    cell: int = Field(32, gt=0, description="side of an object's cell in pixels")
    combinations: str = Field("256-256-256", description="objects of the splits: 256-256-256 or 32-32-224")
    train_images: int | None = Field(
        None, gt=1, description="size of the training set, shuffled every epoch; None: every image is new"
    )

    auxiliary_weight: float = Field(
        1.0, ge=0, description="weight of the disentanglement loss; 0 turns it off"
    )
    auxiliary_site: str = Field("blocks.1.resid_post", description="site whose object tokens the probes read")
    auxiliary_probe: Literal["shape-color", "pair-relation", "object-identity"] = Field(
        "shape-color",
        description="what the probes predict: shape and colour, each from its half of an object's embedding; "
        "the relation of a pair from all its tokens ('cls' in the authors' code); or, as a control, the "
        "object from the whole embedding ('control')",
    )
    freeze_probes: bool = Field(
        False,
        description="leave the probes at the weights that they were drawn with, as the latest version of the "
        "authors' code does, whose optimiser does not get them; by default they are trained with the model",
    )

    pipeline: tuple[PipelineStage, ...] = Field((), description="stages of the pipeline loss; none: no loss")
    pipeline_weight: float = Field(1.0, ge=0, description="weight of the pipeline loss")

    steps: int = Field(4500, gt=0, description="optimiser steps")
    batch_size: int = Field(64, gt=1, description="images a step, over all processes")
    accumulate: int = Field(1, gt=0, description="parts in which a step's images go through the model")
    learning_rate: float = Field(5e-4, gt=0, description="learning rate; the peak of one_cycle")
    schedule: Literal["one_cycle", "constant", "exponential", "plateau", "exponential_of_accuracy"] = Field(
        "one_cycle",
        description="one_cycle; constant; exponential: times gamma every epoch; plateau: a tenth after "
        "`patience` validations without a better accuracy; exponential_of_accuracy: times gamma to the power "
        "of the validation accuracy, which is what the authors' code does",
    )
    gamma: float = Field(0.95, gt=0, le=1, description="factor of the exponential schedules")
    patience: int = Field(40, gt=0, description="validations that plateau waits")
    warmup: float = Field(0.15, gt=0, lt=1, description="share of the steps in which one_cycle rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; None: any")
    precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="mixed precision of forward and backward; weights stay in float32"
    )
    seed: int = Field(0, ge=0, description="seed of the weights and of the images")

    validate_every: int = Field(
        250, gt=0, description="steps between validations; the best checkpoint is kept"
    )
    validation_images: int = Field(
        1024, gt=1, description="held-out images of each validation, the same every time"
    )
    test_splits: tuple[EvaluationSplit, ...] = Field(
        ("test", "test_iid"), min_length=1, description="what the best checkpoint is evaluated on at the end"
    )
    test_images: int = Field(
        6400, gt=1,
        description="images of the evaluation on each split at the end; of train no more than train_images",
    )  # fmt: skip
    log_every: int = Field(50, gt=0, description="steps between lines of the log")
    device: Literal["auto", "cpu"] = Field("auto", description="auto takes an accelerator if there is one")
    threads: int | None = Field(None, gt=0, description="CPU threads; None leaves torch's own choice")
    workers: int = Field(0, ge=0, description="processes that make images ahead; the images are the same")

    @field_validator("auxiliary_probe", mode="before")
    @classmethod
    def _authors_names(cls, value: Any) -> Any:
        return _AUTHORS_PROBES.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}: the parts of a "
                "step hold equally many images"
            )
        if self.train_images is not None and self.train_images < self.batch_size:
            raise ValueError(
                f"train_images={self.train_images} is less than batch_size={self.batch_size}: an epoch would "
                "have no step"
            )
        if self.combinations.startswith("ood-"):
            raise ValueError(
                f"combinations={self.combinations!r} are objects that no training shows, and the probes know "
                f"none of them: train on 256-256-256 or 32-32-224, and put {self.combinations} into "
                "test_splits"
            )
        if self.model_options and not isinstance(self.model, str):
            raise ValueError("model_options are for a model given by its string; give sizes in `model`")
        return self

    @property
    def geometry(self) -> Geometry:
        """The geometry of the images."""
        return Geometry(self.canvas, self.patch, self.cell)

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch: the whole batches in the training set; from validation to validation where every
        image is new.
        """
        return self.validate_every if self.train_images is None else self.train_images // self.batch_size
