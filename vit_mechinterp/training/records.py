"""Trainings that are done: what a folder of them holds, by condition and seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vit_mechinterp.errors import DataError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.training.config import TrainingConfig
from vit_mechinterp.training.presets import PRESETS
from vit_mechinterp.training.saving import load_trained

__all__ = ["Training", "by_condition", "trainings"]

_NO_MATTER = {
    "seed", "preset", "accumulate", "precision", "device", "threads", "workers", "log_every", "test_splits",
    "test_images",
}  # fmt: skip
"""Settings that say which seed it was, and where and how a training ran, not what was trained."""


@dataclass(frozen=True)
class Training:
    """One training as its folder records it; the model is loaded when asked for.

    Attributes:
        folder: where it lies.
        config: its settings.
        best_step: the step of the checkpoint that was kept.
        metrics: of that checkpoint, on the validation images.
        test: of that checkpoint, by split; empty while the training is not done.
    """

    folder: Path
    config: TrainingConfig
    best_step: int
    metrics: Mapping[str, float]
    test: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> Training:
        """Read the record of one training.

        Raises:
            DataError: the folder holds none, or none of this package.
        """
        folder = Path(folder)
        try:
            document: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
            config = TrainingConfig.model_validate(document["config"])
            progress = document["progress"]
            return cls(folder, config, progress["best_step"], progress["best"], document.get("test", {}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{error.error_count()} settings are unknown or do not fit" if isinstance(
                error, ValidationError
            ) else error
            raise DataError(
                f"{folder} holds no readable record of a training ({reason}). Give a folder that "
                "vit-mechinterp train wrote, with its training.json."
            ) from error

    @property
    def is_done(self) -> bool:
        """Whether the training reached its last step and was evaluated."""
        return bool(self.test)

    @property
    def losses(self) -> str:
        """The auxiliary losses: "none", "disentanglement", "pipeline" or "both"; unusual probes by kind."""
        names = []
        if self.config.auxiliary_weight:
            usual = self.config.auxiliary_probe == "shape-color"
            names.append("disentanglement" if usual else f"{self.config.auxiliary_probe} probes")
        if self.config.pipeline and self.config.pipeline_weight:
            names.append("pipeline")
        if names == ["disentanglement", "pipeline"]:
            return "both"
        return " and ".join(names) or "none"

    @property
    def model(self) -> str:
        """What was trained, in words: the preset's label, the model string, or the sizes."""
        model = self.config.model
        if (known := PRESETS.get(self.config.preset or "")) is not None:
            return known.label
        if isinstance(model, str):
            own = not self.config.pretrained
        else:
            own, model = True, f"ViT, {model.depth} blocks of width {model.embed_dim}"
        return f"{model}, from scratch" if own and self.config.initial is None else model

    @property
    def pretraining(self) -> str | None:
        """What the weights had been trained on, in words; None where that is not known."""
        if self.config.initial is not None:
            return f"starts from {self.config.initial}"
        if (known := PRESETS.get(self.config.preset or "")) is not None:
            return known.pretraining
        return None if isinstance(self.config.model, str) and self.config.pretrained else "none"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the model beside its seed: the settings that are in use."""
        own = self.config.model_dump(exclude=_NO_MATTER)
        unused = set()
        if not self.config.auxiliary_weight:
            unused |= {"auxiliary_weight", "auxiliary_site", "auxiliary_probe", "freeze_probes"}
        if not (self.config.pipeline and self.config.pipeline_weight):
            unused |= {"pipeline", "pipeline_weight"}
        return {name: value for name, value in own.items() if name not in unused}

    def load(self) -> HookedViT:
        """Load the checkpoint that was kept."""
        return load_trained(self.folder)


def trainings(folder: str | Path, *, unfinished: bool = False) -> list[Training]:
    """Read the records of all trainings in the folders below one folder, in the order of their names.

    Args:
        folder: holds one folder for each training (or is itself one); hidden folders in it are left out.
        unfinished: return those that were not evaluated yet as well.

    Raises:
        DataError: there is none, or a record cannot be read.
    """
    folder = Path(folder)
    paths = sorted(folder.rglob("training.json"))
    hidden = {path for path in paths if any(part.startswith(".") for part in path.relative_to(folder).parts)}
    found = [Training.read(path.parent) for path in paths if path not in hidden]
    done = [training for training in found if unfinished or training.is_done]
    if not done:
        rest = f"; {len(found)} there are not done (unfinished=True reads them)" if found else ""
        raise DataError(f"{folder} holds no finished training{rest}. Give the folder that --out wrote into.")
    return done


def by_condition(records: Iterable[Training]) -> dict[str, dict[int, Training]]:
    """Group trainings that differ in their seed alone: condition to seed to training.

    A condition is named by what differs between the trainings given: the model, the auxiliary losses, the
    task, the combinations; by the losses where nothing does. Trainings that these words do not tell apart are
    told apart by the other settings in which they differ ("disentanglement loss, steps 9000").

    Raises:
        DataError: two trainings have one seed and the same settings.
    """
    records = list(records)
    words = {
        record.folder: {
            "model": record.model,
            "losses": {"none": "no auxiliary loss", "both": "both losses"}.get(
                record.losses, f"{record.losses} loss"
            ),
            "task": record.config.task,
            "combinations": record.config.combinations,
        }
        for record in records
    }
    differing = [name for name in ("model", "losses", "task", "combinations")
                 if len({own[name] for own in words.values()}) > 1] or ["losses"]  # fmt: skip
    alike: dict[str, list[Training]] = {}
    for record in records:
        condition = ", ".join(words[record.folder][name] for name in differing)
        alike.setdefault(condition, []).append(record)
    groups: dict[str, dict[int, Training]] = {}
    for condition, own in alike.items():
        for record, more in zip(own, _told_apart(own), strict=True):
            seeds = groups.setdefault(condition + more, {})
            if record.config.seed in seeds:
                raise DataError(
                    f"{record.folder} and {seeds[record.config.seed].folder} are both {condition + more!r} "
                    f"with seed {record.config.seed}, and all their settings are the same. Group them "
                    "yourself: "
                    "{condition: {seed: Training.read(folder)}}."
                )
            seeds[record.config.seed] = record
    return groups


def _told_apart(records: list[Training]) -> list[str]:
    """For each training the settings, beside its seed, in which it differs from others of the group."""
    settings = [record.settings for record in records]
    names = dict.fromkeys(name for own in settings for name in own)
    odd = [name for name in names if any(own.get(name) != settings[0].get(name) for own in settings)]
    if "initial" in odd and len({_without_seed(record) for record in records}) == 1:
        odd.remove("initial")  # every seed starts from the model of its own seed
    return ["".join(f", {name} {_brief(own.get(name))}" for name in odd) for own in settings]


def _without_seed(record: Training) -> str:
    """What a training started from, without the seed in its name where that is the training's own."""
    return (record.config.initial or "").removesuffix(f"-{record.config.seed}")


def _brief(value: Any) -> str:
    """A setting in a condition's name."""
    if isinstance(value, float):
        return f"{value:g}"
    stages = isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value)
    if not (stages and value):
        return str(value)
    return "; ".join(f"{one['attention']} in {', '.join(map(str, one['layers']))}" for one in value)
