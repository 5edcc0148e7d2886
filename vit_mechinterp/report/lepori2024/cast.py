"""Which trained models play which part in the paper's figures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vit_mechinterp.errors import DataError
from vit_mechinterp.training.records import Training, by_condition, trainings

if TYPE_CHECKING:
    from vit_mechinterp.model.hooked import HookedViT

__all__ = ["CHECKPOINTS", "SUBJECT", "TASKS", "TASK_NAMES", "Cast", "Player"]

CHECKPOINTS: Final = Path(__file__).parents[2] / "checkpoints"
"""The trained models that the package ships."""

TASKS: Final = ("discrimination", "rmts")
TASK_NAMES: Final = {"discrimination": "discrimination", "rmts": "relational match to sample"}

SUBJECT: Final = "subject"
"""The part that CLIP has in the paper: the model that most figures are about."""

_PRESETS: Final = {
    "dino": "dino-b16",
    "dinov2": "dinov2-b14",
    "imagenet": "imagenet21k-b16",
    "mae": "mae-b16",
}
_ABOVE_CHANCE: Final = 0.6
"""A model at or below this accuracy on images of known objects has not learned its task: half are right by
guessing, and the pairs that are easiest to tell add a little."""


@dataclass(frozen=True)
class Player:
    """A trained model in one of the parts."""

    part: str
    training: Training

    @property
    def task(self) -> str:
        """The task that it was trained on."""
        return self.training.config.task

    @property
    def accuracy(self) -> float:
        """Accuracy on new images of the objects that it was validated on."""
        return _accuracy(self.training)

    @property
    def learned(self) -> bool:
        """Whether it is above chance."""
        return self.accuracy > _ABOVE_CHANCE

    @property
    def words(self) -> str:
        """What it is called in titles."""
        own = self.training
        losses = {"none": "without auxiliary loss", "both": "both auxiliary losses"}.get(
            own.losses, f"{own.losses} loss"
        )
        return own.model if own.config.preset else f"tiny ViT, {losses}"

    @property
    def sizes(self) -> dict[str, Any]:
        """The geometry of its stimuli."""
        config = self.training.config
        return {"canvas": config.canvas, "patch": config.patch, "cell": config.cell}

    @cached_property
    def digest(self) -> str:
        """Of its weights and settings: what a result on this model depends on."""
        found = hashlib.sha256()
        for name in ("model.safetensors", "config.json"):
            path = self.training.folder / name
            found.update(path.read_bytes() if path.is_file() else b"")
        return found.hexdigest()[:16]

    @cached_property
    def vit(self) -> HookedViT:
        """The model, on an accelerator if there is one."""
        import torch

        found = self.training.load()
        if torch.cuda.is_available():
            found.module.to("cuda")
        return found


class Cast:
    """The parts, filled from a folder of trainings.

    ``subject`` is CLIP ViT-B/16 where it is among them, else the model that is right most often; ``scratch``
    the one trained without auxiliary loss from random weights; ``dino``, ``dinov2``, ``imagenet`` and ``mae``
    the paper's other models. Models that saw all combinations of shape and colour go before others.

    Args:
        folder: holds one folder for each training; the shipped models by default.

    Raises:
        DataError: the folder holds no finished training.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else CHECKPOINTS
        self.records = [one for one in trainings(self.folder) if one.config.task in TASKS]
        if not self.records:
            raise DataError(
                f"{self.folder} holds no training on {' or '.join(TASKS)}, which this paper is about."
            )
        self._players: dict[tuple[str, str], Player] = {}
        for task in TASKS:
            for part, training in _parts([one for one in self.records if one.config.task == task]):
                self._players[task, part] = Player(part, training)

    def player(self, task: str, part: str = SUBJECT) -> Player | None:
        """The model of a part, or None."""
        return self._players.get((task, part))

    def conditions(self, task: str) -> dict[str, dict[int, Training]]:
        """All trainings on a task by condition and seed."""
        own = [one for one in self.records if one.config.task == task]
        return by_condition(own) if own else {}

    def players(self, task: str) -> list[Player]:
        """One player per condition of a task: the seed that is right most often."""
        found = []
        for condition, seeds in self.conditions(task).items():
            found.append(Player(condition, max(seeds.values(), key=_accuracy)))
        return found


def _parts(records: Sequence[Training]) -> Iterable[tuple[str, Training]]:
    if not records:
        return
    seen_all = [one for one in records if one.config.combinations == "256-256-256"] or list(records)
    clip = [one for one in seen_all if one.config.preset == "clip-b16"]
    yield SUBJECT, max(clip or seen_all, key=_accuracy)
    scratch = [one for one in seen_all if one.losses == "none" and one.pretraining in ("none", None)]
    scratch = [one for one in scratch if one.config.preset in (None, "scratch-b16")]
    if scratch:
        yield "scratch", min(scratch, key=lambda one: one.config.seed)
    for part, name in _PRESETS.items():
        own = [one for one in seen_all if one.config.preset == name]
        if own:
            yield part, max(own, key=_accuracy)


def _accuracy(training: Training) -> float:
    test = training.test.get("test_iid") or next(iter(training.test.values()))
    return float(test["accuracy"])
