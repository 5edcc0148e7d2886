"""Training of models on the stimuli, with or without auxiliary losses."""

from __future__ import annotations

from vit_mechinterp.training.auxiliary import (
    AuxiliaryLoss,
    DisentanglementProbes,
    IdentityProbe,
    ProbeLoss,
    RelationProbes,
)
from vit_mechinterp.training.config import EVALUATION_SPLITS, ModelConfig, TrainingConfig
from vit_mechinterp.training.evaluate import answers, evaluate
from vit_mechinterp.training.heads import with_two_way_head
from vit_mechinterp.training.images import evaluation_images
from vit_mechinterp.training.loop import TrainingResult, train
from vit_mechinterp.training.models import build_vit
from vit_mechinterp.training.objective import Objective, objective, token_positions
from vit_mechinterp.training.pipeline import PipelineStage, object_attention, pipeline_loss
from vit_mechinterp.training.presets import PRESETS, Preset, preset
from vit_mechinterp.training.records import Training, by_condition, trainings
from vit_mechinterp.training.saving import load_trained

__all__ = [
    "EVALUATION_SPLITS",
    "PRESETS",
    "AuxiliaryLoss",
    "DisentanglementProbes",
    "IdentityProbe",
    "ModelConfig",
    "Objective",
    "PipelineStage",
    "Preset",
    "ProbeLoss",
    "RelationProbes",
    "Training",
    "TrainingConfig",
    "TrainingResult",
    "answers",
    "build_vit",
    "by_condition",
    "evaluate",
    "evaluation_images",
    "load_trained",
    "object_attention",
    "objective",
    "pipeline_loss",
    "preset",
    "token_positions",
    "train",
    "trainings",
    "with_two_way_head",
]
