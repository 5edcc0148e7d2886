"""Which trained models play which part in the paper's figures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vit_mechinterp.errors import DataError
from vit_mechinterp.training.records import Training, by_condition, trainings

if TYPE_CHECKING:
    from vit_mechinterp.model.hooked import HookedViT

__all__ = [
    "ABOVE_CHANCE",
    "CHECKPOINTS",
    "HELD_OUT",
    "SUBJECT",
    "TASKS",
    "TASK_NAMES",
    "Cast",
    "Player",
    "digest_of",
]

CHECKPOINTS: Final = Path(__file__).parents[2] / "checkpoints"
"""The trained models that the package ships."""

TASKS: Final = ("discrimination", "rmts")
TASK_NAMES: Final = {"discrimination": "discrimination", "rmts": "relational match to sample"}

SUBJECT: Final = "subject"
"""The part that CLIP has in the paper: the model that most figures are about."""

HELD_OUT: Final = "held_out"
"""The model in the part of CLIP that held objects out of its training (32 of 256 combinations were seen)."""

_ALL_OBJECTS: Final = "256-256-256"
_PRESETS: Final = {
    "dino": "dino-b16",
    "dinov2": "dinov2-b14",
    "imagenet": "imagenet21k-b16",
    "mae": "mae-b16",
}
ABOVE_CHANCE: Final = 0.6
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
        return self.accuracy > ABOVE_CHANCE

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

    @property
    def digest(self) -> str:
        """Of its weights and its record: what a result on this model depends on."""
        return digest_of(self.training)

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

    ``subject`` is CLIP ViT-B/16 where it is among them, else the model that is right most often, and
    ``held_out`` the same among those that held objects out of their training; ``scratch`` the one trained
    without auxiliary loss from random weights; ``dino``, ``dinov2``, ``imagenet`` and ``mae`` the paper's
    other models. Models that saw all combinations of shape and colour go before others.

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

    @property
    def where(self) -> str:
        """The folder in words: the shipped models are not said to lie anywhere."""
        return "the package" if self.folder == CHECKPOINTS else str(self.folder)

    def player(self, task: str, part: str = SUBJECT) -> Player | None:
        """The model of a part, or None."""
        return self._players.get((task, part))

    def players(self, task: str, at_most: int | None = None) -> list[Player]:
        """The models of a task that are set beside one another, those that held objects out of their training
        if there are three or more of these, as in the paper.

        Of every condition first the seed that is right most often, then its other seeds in turn.

        Args:
            task: the models' task.
            at_most: how many; all if left out.
        """
        own = [one for one in self.records if one.config.task == task]
        held_out = [one for one in own if one.config.combinations != _ALL_OBJECTS]
        own = held_out if len(held_out) >= 3 else own
        ranked: list[tuple[int, str, Training]] = []
        for condition, seeds in by_condition(own).items() if own else ():
            first = max(seeds.values(), key=_accuracy)
            rest = [one for _, one in sorted(seeds.items()) if one is not first]
            ranked += [(place, condition, one) for place, one in enumerate([first, *rest])]
        chosen = sorted(ranked, key=lambda one: one[0])[:at_most]
        shown = [condition for _, condition, _ in chosen]
        return [
            Player(condition if shown.count(condition) == 1 else f"{condition}, seed {one.config.seed}", one)
            for _, condition, one in chosen
        ]


def _parts(records: Sequence[Training]) -> Iterable[tuple[str, Training]]:
    if not records:
        return
    seen_all = [one for one in records if one.config.combinations == _ALL_OBJECTS] or list(records)
    yield SUBJECT, _leading(seen_all)
    held_out = [one for one in records if one not in seen_all]
    if held_out:
        yield HELD_OUT, _leading(held_out)
    scratch = [one for one in seen_all if one.losses == "none" and one.pretraining in ("none", None)]
    scratch = [one for one in scratch if one.config.preset in (None, "scratch-b16")]
    if scratch:
        yield "scratch", min(scratch, key=lambda one: one.config.seed)
    for part, name in _PRESETS.items():
        own = [one for one in seen_all if one.config.preset == name]
        if own:
            yield part, max(own, key=_accuracy)


def _leading(records: Sequence[Training]) -> Training:
    """CLIP ViT-B/16, else whichever is right most often."""
    clip = [one for one in records if one.config.preset == "clip-b16"]
    return max(clip or records, key=_accuracy)


def digest_of(training: Training) -> str:
    """Digest of a training's weights and record."""
    names = ("model.safetensors", "config.json", "training.json")
    files = [training.folder.resolve() / name for name in names]
    # A file that was written again is read again.
    stats = {file: file.stat() for file in files if file.is_file()}
    return _digest(tuple((file, own.st_size, own.st_mtime_ns) for file, own in stats.items()))


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    found = hashlib.sha256()
    for file, _, _ in files:
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()[:16]


def _accuracy(training: Training) -> float:
    test = training.test.get("test_iid") or next(iter(training.test.values()))
    return float(test["accuracy"])
