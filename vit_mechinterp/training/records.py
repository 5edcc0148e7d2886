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
            return model if self.config.pretrained else f"{model}, from scratch"
        return f"ViT, {model.depth} blocks of width {model.embed_dim}, from scratch"

    @property
    def pretraining(self) -> str | None:
        """What the weights had been trained on, in words; None where that is not known."""
        if (known := PRESETS.get(self.config.preset or "")) is not None:
            return known.pretraining
        scratch = not (isinstance(self.config.model, str) and self.config.pretrained)
        return "none" if scratch and self.config.initial is None else None

    def load(self) -> HookedViT:
        """Load the checkpoint that was kept."""
        return load_trained(self.folder)


def trainings(folder: str | Path, *, unfinished: bool = False) -> list[Training]:
    """Read the records of all trainings in the folders below one folder, in the order of their names.

    Args:
        folder: holds one folder for each training (or is itself one).
        unfinished: return those that were not evaluated yet as well.

    Raises:
        DataError: there is none, or a record cannot be read.
    """
    folder = Path(folder)
    found = [Training.read(path.parent) for path in sorted(folder.rglob("training.json"))]
    done = [training for training in found if unfinished or training.is_done]
    if not done:
        rest = f"; {len(found)} there are not done (unfinished=True reads them)" if found else ""
        raise DataError(f"{folder} holds no finished training{rest}. Give the folder that --out wrote into.")
    return done


def by_condition(records: Iterable[Training]) -> dict[str, dict[int, Training]]:
    """Group trainings that differ in their seed alone: condition to seed to training.

    A condition is named by what differs between the trainings given: the model, the auxiliary losses, the
    task, the combinations; by the losses where nothing does.

    Raises:
        DataError: two trainings of one seed have the same condition by these words, but other settings.
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
    groups: dict[str, dict[int, Training]] = {}
    for record in records:
        condition = ", ".join(words[record.folder][name] for name in differing)
        seeds = groups.setdefault(condition, {})
        if record.config.seed in seeds:
            raise DataError(
                f"{record.folder} and {seeds[record.config.seed].folder} are both {condition!r} with seed "
                f"{record.config.seed}. Group them yourself: {{condition: {{seed: Training.read(folder)}}}}."
            )
        seeds[record.config.seed] = record
    return groups
