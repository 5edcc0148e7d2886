"""Training of models on the stimuli, from scratch, with or without the disentanglement loss."""

from __future__ import annotations

from vit_mechinterp.training.auxiliary import AuxiliaryLoss, DisentanglementProbes
from vit_mechinterp.training.config import ModelConfig, TrainingConfig
from vit_mechinterp.training.evaluate import evaluate
from vit_mechinterp.training.loop import TrainingResult, train
from vit_mechinterp.training.objective import Objective, objective

__all__ = [
    "AuxiliaryLoss",
    "DisentanglementProbes",
    "ModelConfig",
    "Objective",
    "TrainingConfig",
    "TrainingResult",
    "evaluate",
    "objective",
    "train",
]
