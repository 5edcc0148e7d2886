"""A finished training as the package ships it: weights in half precision, measured again, with a README.

    python -m vit_mechinterp.training.shipping runs/NAME vit_mechinterp/checkpoints/NAME
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vit_mechinterp.errors import DataError
from vit_mechinterp.training.checkpoint import write_json
from vit_mechinterp.training.config import EVALUATION_SPLITS, TrainingConfig
from vit_mechinterp.training.evaluate import evaluate
from vit_mechinterp.training.images import evaluation_count, evaluation_images
from vit_mechinterp.training.models import normalization_of
from vit_mechinterp.training.records import Training
from vit_mechinterp.training.saving import load_trained

__all__ = ["readme", "ship"]

_CHANCE_BELOW = 0.6


def ship(run: str | Path, out: str | Path, *, progress: bool = True) -> Path:
    """Copy the best checkpoint of a training, and return the folder.

    Weights are rounded to float16, which halves the file; the model is loaded from them in float32, and its
    record gets the accuracies that it has then, on every split.

    Args:
        run: the folder of a finished training of a timm model.
        out: a folder that does not exist yet.
        progress: show bars while the model is measured.

    Raises:
        DataError: the training is not finished, or ``out`` exists.
    """
    run, out = Path(run), Path(out)
    training = Training.read(run)
    if not training.is_done:
        raise DataError(f"{run} is not finished. Resume it: vit-mechinterp train --out {run} --resume ...")
    if out.exists():
        raise DataError(f"{out} exists. Remove it, or choose another folder.")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _half(run / "model.safetensors", partial / "model.safetensors")
    for name in ("config.json", "log.jsonl"):
        shutil.copy(run / name, partial / name)
    document = json.loads((run / "training.json").read_text(encoding="utf-8"))
    write_json(partial / "training.json", document)
    vit = load_trained(partial)
    config = training.config
    images = {split: evaluation_images(config, split, normalization_of(vit)) for split in EVALUATION_SPLITS}
    document["test"] = {
        split: evaluate(vit, own, evaluation_count(config, split), progress=progress)
        for split, own in images.items()
    }
    write_json(partial / "training.json", document)
    weights = sum(parameter.numel() for parameter in vit.module.parameters())
    (partial / "README.md").write_text(readme(out.name, document, weights), encoding="utf-8")
    partial.rename(out)
    return out


def readme(name: str, document: Mapping[str, Any], weights: int) -> str:
    """Return the page about a shipped model, every number of it from the record."""
    config = TrainingConfig.model_validate(document["config"])
    test, progress = document["test"], document["progress"]
    columns = list(test)
    kinds = [key for key in test["test_iid"] if key.startswith("accuracy")]
    rows = [
        f"| {_words(kind)} | " + " | ".join(_number(test[split].get(kind)) for split in columns) + " |"
        for kind in kinds
    ]
    iid = test["test_iid"]["accuracy"]
    learned = (
        "It has hardly learned the task: half of the images are right by guessing."
        if iid <= _CHANCE_BELOW
        else f"It is right on {iid:.1%} of new images of known objects."
    )
    model = config.model
    sizes = model if isinstance(model, str) else (
        f"{model.depth} blocks, width {model.embed_dim}, {model.num_heads} heads"
    )  # fmt: skip
    data = (
        f"A timm `VisionTransformer` ({sizes}; CLS token, patches of {config.patch} px, images of "
        f"{config.canvas} px; {weights:,} weights), started from {_start(config)}. The "
        f"images are `vit_mechinterp.stimuli.{config.task}` at canvas {config.canvas}, patch {config.patch}, "
        f"cell {config.cell}, combinations {config.combinations}. {_shown(config)}: "
        f"{config.steps} steps of {config.batch_size}, AdamW, {_rate(config)}, "
        f"seed {config.seed}, mixed precision: {config.precision}. `training.json` "
        "has every setting, the versions and the metrics; `log.jsonl` has the course of the training. The "
        "weights are stored in half precision, and were measured as they are stored."
    )
    kept = (
        f"The best validation (step {progress['best_step']}, {progress['best']['accuracy']:.4f} on "
        f"{config.validation_images:,} images) was kept, and then measured on {config.test_images:,} "
        f"images of every split{_of_train(config)}. Those of train were trained on, and the first "
        f"{config.validation_images:,} "
        "of val chose the checkpoint; the others did neither."
    )
    limits = (
        f"{learned} One size and one kind of image: these numbers say nothing about other sizes or "
        "photographs."
    )
    command = " ".join(word for word in document["command"].split() if word not in ("--resume", "--quiet"))
    parts = [
        f"# {name}",
        f"A small ViT trained on {_TASKS[config.task]}, {_losses(config)}.",
        f'```python\nimport vit_mechinterp as vmi\nvit = vmi.load("vmi/{name}")\n```',
        "## Model and data",
        textwrap.fill(data, 120),
        f"    {command}",
        "## Accuracy",
        textwrap.fill(kept, 120),
        "\n".join([f"| images | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}", *rows]),
        textwrap.fill(limits, 120),
    ]
    return "\n\n".join(parts) + "\n"


_TASKS = {"discrimination": "the discrimination task", "rmts": "relational match to sample"}


def _start(config: TrainingConfig) -> str:
    if config.initial is not None:
        return config.initial
    return "its own weights" if isinstance(config.model, str) and config.pretrained else "random weights"


def _shown(config: TrainingConfig) -> str:
    if config.train_images is None:
        return "Every training image was new"
    return f"The {config.train_images:,} training images were shuffled every epoch"


def _of_train(config: TrainingConfig) -> str:
    own = evaluation_count(config, "train")
    return "" if own == config.test_images else f" ({own:,} of train)"


def _rate(config: TrainingConfig) -> str:
    if config.schedule == "one_cycle":
        return f"one-cycle learning rate up to {config.learning_rate:g}"
    return f"learning rate {config.learning_rate:g} ({config.schedule.replace('_', ' ')})"


def _losses(config: TrainingConfig) -> str:
    losses = []
    if config.auxiliary_weight:
        losses.append(f"the disentanglement loss at `{config.auxiliary_site}`")
    if config.pipeline and config.pipeline_weight:
        stages = ", ".join(
            f"{stage.attention.replace('_', ' ')} in layers {', '.join(map(str, stage.layers))}"
            for stage in config.pipeline
        )
        losses.append(f"the pipeline loss ({stages})")
    return f"with {' and '.join(losses)}" if losses else "without an auxiliary loss"


def _words(kind: str) -> str:
    return kind.removeprefix("accuracy").strip("_").replace("_", " ") or "all"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _half(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source)
    halves = {name: value.to(torch.float16) for name, value in tensors.items()}
    save_file(halves, target, metadata={"format": "pt"})


if __name__ == "__main__":
    ship(*sys.argv[1:3])
