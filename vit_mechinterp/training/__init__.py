"""Training of models on the stimuli, with or without auxiliary losses."""

from __future__ import annotations

from vit_mechinterp.training.auxiliary import AuxiliaryLoss, DisentanglementProbes
from vit_mechinterp.training.config import ModelConfig, TrainingConfig
from vit_mechinterp.training.evaluate import evaluate
from vit_mechinterp.training.loop import TrainingResult, train
from vit_mechinterp.training.objective import Objective, objective
from vit_mechinterp.training.pipeline import PipelineStage, object_attention, pipeline_loss

__all__ = [
    "AuxiliaryLoss",
    "DisentanglementProbes",
    "ModelConfig",
    "Objective",
    "PipelineStage",
    "TrainingConfig",
    "TrainingResult",
    "evaluate",
    "object_attention",
    "objective",
    "pipeline_loss",
    "train",
]
