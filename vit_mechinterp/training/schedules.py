"""The learning rate over the steps of a training, and how it is put back on resuming."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from vit_mechinterp.training.config import TrainingConfig

__all__ = ["Schedule"]


class Schedule:
    """The learning rate of one training.

    ``one_cycle``, ``constant`` and ``exponential`` depend on the step alone; ``plateau`` and
    ``exponential_of_accuracy`` on validations, so what they remember is saved with the training.

    Args:
        optimizer: whose learning rate is set.
        config: names the schedule and its settings.
    """

    def __init__(self, optimizer: Optimizer, config: TrainingConfig) -> None:
        self.optimizer, self.config = optimizer, config
        self.by_step: LRScheduler | None = None
        self.by_accuracy: ReduceLROnPlateau | None = None
        match config.schedule:
            case "one_cycle":
                self.by_step = OneCycleLR(
                    optimizer,
                    max_lr=config.learning_rate,
                    total_steps=config.steps + 1,
                    pct_start=config.warmup,
                )
            case "exponential":
                self.by_step = LambdaLR(optimizer, lambda step: config.gamma ** (step // config.epoch_steps))
            case "plateau":
                self.by_accuracy = ReduceLROnPlateau(optimizer, mode="max", patience=config.patience)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """Go on by one step."""
        if self.by_step is not None:
            self.by_step.step()

    def after_validation(self, accuracy: float) -> None:
        """Take note of a validation."""
        if self.by_accuracy is not None:
            self.by_accuracy.step(accuracy)
        elif self.config.schedule == "exponential_of_accuracy":
            self._set(self.config.learning_rate * self.config.gamma**accuracy)

    def state(self) -> dict[str, Any]:
        """What cannot be told from the step; empty for most schedules."""
        if self.by_accuracy is not None:
            return {"rate": self.rate, "plateau": _plain(self.by_accuracy.state_dict())}
        if self.config.schedule == "exponential_of_accuracy":
            return {"rate": self.rate}
        return {}

    def restore(self, steps: int, state: dict[str, Any]) -> None:
        """Go to where the schedule was after that many steps."""
        if self.by_step is not None:
            with warnings.catch_warnings():
                # torch warns because the schedule moves before the optimiser does: what resuming means.
                warnings.simplefilter("ignore", UserWarning)
                for _ in range(steps):
                    self.by_step.step()
        if self.by_accuracy is not None and "plateau" in state:
            self.by_accuracy.load_state_dict(state["plateau"])
        if "rate" in state:
            self._set(state["rate"])

    def _set(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def _plain(value: Any) -> Any:
    """Numbers of a scheduler's state as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, torch.Tensor) else value
