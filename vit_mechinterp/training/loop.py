"""Training on images that are never shown twice."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_mechinterp.engine.provenance import versions
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.registry import wrap
from vit_mechinterp.stimuli.batches import TaskGenerator
from vit_mechinterp.stimuli.discrimination import DiscriminationGenerator
from vit_mechinterp.stimuli.rmts import RMTSGenerator
from vit_mechinterp.training.auxiliary import DisentanglementProbes
from vit_mechinterp.training.checkpoint import build_model, load_state, save_model, save_state, write_json
from vit_mechinterp.training.config import TrainingConfig
from vit_mechinterp.training.evaluate import evaluate
from vit_mechinterp.training.objective import objective

__all__ = ["TrainingResult", "train"]

_TASKS: dict[str, Callable[..., TaskGenerator[Any]]] = {
    "discrimination": DiscriminationGenerator,
    "rmts": RMTSGenerator,
}
_LIBRARIES = ("torch", "timm", "accelerate", "numpy")


@dataclass(frozen=True)
class TrainingResult:
    """Where a trained model lies, and how well it did.

    Attributes:
        folder: holds the best checkpoint (``model.safetensors``, ``config.json``), ``training.json`` and
            ``log.jsonl``.
        best_step: the step of the best checkpoint.
        metrics: of the best checkpoint, on the validation images.
        test: of the best checkpoint, on images that chose nothing: by split ("test", "test_iid").
    """

    folder: Path
    best_step: int
    metrics: dict[str, float]
    test: dict[str, dict[str, float]]


def train(
    config: TrainingConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    command: str | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train a model and keep its best checkpoint, measured on held-out images.

    AdamW with a one-cycle learning rate; every ``validate_every`` steps the model is evaluated on the first
    images of the "val" split; at the end the best checkpoint is evaluated on "test" and "test_iid". Step s
    sees images ``s * batch_size ...`` of the "train" split, so a resumed run sees what an uninterrupted one
    would have seen.

    Args:
        config: what to train, and how.
        folder: where the checkpoint, ``training.json``, ``log.jsonl`` and the state to resume from
            (``state/``) go.
        resume: go on from the state in ``folder``.
        command: the command line, to be recorded in ``training.json``.
        progress: show a progress bar.

    Raises:
        DataError: the folder holds a training and ``resume`` is false, or one with other settings.
        TensorFileError: ``resume`` is true and the folder holds no state, or that of another model.
        SpecError: the settings do not fit one another, or ``auxiliary_site`` is no site of the model.
    """
    folder = Path(folder)
    _check_folder(folder, config, resume)
    folder.mkdir(parents=True, exist_ok=True)
    with _cpu_settings(config.threads):
        return _train(config, folder, resume, command, progress)


def _train(
    config: TrainingConfig, folder: Path, resume: bool, command: str | None, progress: bool
) -> TrainingResult:
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    options = {name: getattr(config, name) for name in ("seed", "canvas", "patch", "cell", "combinations")}
    task = _TASKS[config.task]
    images, held_out = task("train", **options), task("val", **options)

    accelerator = Accelerator(cpu=config.device == "cpu")
    module, probes = accelerator.prepare(build_model(config), _build_probes(config))
    vit = wrap(module)
    _check_sites(vit, config)
    modules: dict[str, nn.Module] = {"model": module, "probes": probes}
    parameters = [parameter for owner in modules.values() for parameter in owner.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=config.steps + 1, pct_start=config.warmup
    )
    state: dict[str, Any] = {"step": 0, "best_step": 0, "best": {}, "seconds": 0.0}
    if resume:
        state = load_state(folder / "state", modules, optimizer)
        _forward_schedule(schedule, state["step"])
        _keep_log(folder / "log.jsonl", state["step"])

    document = {"command": command, "config": config.model_dump(), "versions": versions(_LIBRARIES)}
    module.train()
    began = time.perf_counter() - state["seconds"]
    steps = tqdm(
        range(state["step"], config.steps),
        desc="train",
        initial=state["step"],
        total=config.steps,
        disable=not progress,
    )
    with (folder / "log.jsonl").open("a" if resume else "w") as log:
        for step in steps:
            batch = images.batch(step * config.batch_size, config.batch_size)
            loss, line = objective(vit, probes, batch, config, step)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(parameters, config.clip)
            line |= {"gradient_norm": float(norm), "learning_rate": optimizer.param_groups[0]["lr"]}
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()

            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                _write_line(log, {"step": done, "seconds": time.perf_counter() - began, **line})
            if done % config.validate_every == 0 or done == config.steps:
                metrics = evaluate(module, held_out, config.validation_images)
                seconds = time.perf_counter() - began
                _write_line(log, {"step": done, "seconds": seconds, "validation": metrics})
                if metrics["accuracy"] > state["best"].get("accuracy", -1.0):
                    state |= {"best": metrics, "best_step": done}
                    save_model(module, config, folder)
                state |= {"step": done, "seconds": seconds}
                save_state(folder / "state", modules, optimizer, state)
                write_json(folder / "training.json", document | {"progress": state})
    test = _test(module, folder, task, options, config.test_images, progress)
    write_json(folder / "training.json", document | {"progress": state, "test": test})
    return TrainingResult(folder, state["best_step"], state["best"], test)


def _test(
    module: nn.Module,
    folder: Path,
    task: Callable[..., TaskGenerator[Any]],
    options: dict[str, Any],
    n: int,
    progress: bool,
) -> dict[str, dict[str, float]]:
    """Evaluate the best checkpoint on the two test splits."""
    from safetensors.torch import load_file

    module.load_state_dict(load_file(folder / "model.safetensors"))
    return {
        split: evaluate(module, task(split, **options), n, progress=progress)
        for split in ("test", "test_iid")
    }


def _check_sites(vit: HookedViT, config: TrainingConfig) -> None:
    """Raise SpecError before the first step if a loss reads what the model or the task has not."""
    vit.expand([config.auxiliary_site] if config.auxiliary_weight else [])
    for stage in config.pipeline:
        vit.expand(list(stage.sites))
        beyond = [head for head in stage.heads or () if not 0 <= head < vit.layout.n_heads]
        if beyond:
            raise SpecError(
                f"The pipeline stage {stage.attention} names heads {beyond}; the model's are 0 to "
                f"{vit.layout.n_heads - 1}."
            )
        if stage.attention == "between_pairs" and config.task != "rmts":
            raise SpecError(
                "The pipeline stage between_pairs needs two pairs of objects, and an image of "
                f"{config.task} shows one: leave the stage out, or set task to rmts."
            )


def _build_probes(config: TrainingConfig) -> DisentanglementProbes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        return DisentanglementProbes(config.model.embed_dim)


def _check_folder(folder: Path, config: TrainingConfig, resume: bool) -> None:
    path = folder / "training.json"
    if not path.exists():
        return
    if not resume:
        raise DataError(f"{folder} holds a training already. Resume it, or choose another folder.")
    before = TrainingConfig.model_validate(json.loads(path.read_text())["config"]).model_dump()
    wanted = config.model_dump()
    changed = [
        f"{name}: {before.get(name)} -> {wanted[name]}" for name in wanted if before.get(name) != wanted[name]
    ]
    if changed:
        raise DataError(
            f"{folder} holds a training with other settings ({'; '.join(changed)}). Resume it with its own "
            "settings, or choose another folder."
        )


@contextmanager
def _cpu_settings(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    torch.set_flush_denormal(True)  # arithmetic on denormal numbers, frequent in optimiser moments, is slow
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def _forward_schedule(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        # torch warns because the schedule moves before the optimiser does, which is what resuming means.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            schedule.step()


def _keep_log(path: Path, steps: int) -> None:
    """Drop what an interrupted run had logged after the state from which it resumes."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text(
        "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps)
    )


def _write_line(log: Any, line: dict[str, Any]) -> None:
    log.write(json.dumps(line) + "\n")
    log.flush()
