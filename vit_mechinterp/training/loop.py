"""The training loop: one process or several, resumed exactly."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit_mechinterp.engine.results.provenance import versions
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.stimuli.batches import TaskBatch
from vit_mechinterp.stimuli.render import NORMALIZATION
from vit_mechinterp.training.auxiliary import make_probes
from vit_mechinterp.training.checkpoint import load_state, save_state, write_json
from vit_mechinterp.training.config import TrainingConfig
from vit_mechinterp.training.evaluate import evaluate
from vit_mechinterp.training.images import TrainingImages, evaluation_count, evaluation_images
from vit_mechinterp.training.models import build_vit, normalization_of
from vit_mechinterp.training.objective import objective
from vit_mechinterp.training.processes import accelerator_for, on_main
from vit_mechinterp.training.records import Training
from vit_mechinterp.training.saving import load_trained, save_model
from vit_mechinterp.training.schedules import Schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainingResult", "train"]

_LIBRARIES = ("torch", "timm", "accelerate", "numpy")


@dataclass(frozen=True)
class TrainingResult:
    """Where a trained model lies, and how well it did.

    Attributes:
        folder: holds the best checkpoint (``model.safetensors``, ``config.json``), ``training.json`` and
            ``log.jsonl``.
        best_step: the step of the best checkpoint.
        metrics: of the best checkpoint, on the validation images.
        test: of the best checkpoint, by split of ``config.test_splits``.
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

    AdamW on the objective (see `objective`); every ``validate_every`` steps the model is evaluated on the
    first images of the "val" split; at the end the best checkpoint is evaluated on ``test_splits``. A step's
    images depend on the step alone (see `TrainingImages`), so a resumed run sees what an uninterrupted one
    would have seen. Started by ``accelerate launch``, every process takes an equal share of a step's images.

    Args:
        config: what to train, and how.
        folder: where the checkpoint, ``training.json``, ``log.jsonl`` and the state to resume from
            (``state/``) go.
        resume: go on from the state in ``folder``.
        command: the command line, to be recorded in ``training.json``.
        progress: show a progress bar.

    Raises:
        DataError: the folder holds a training and ``resume`` is false, or one with other settings or an
            unreadable record; or it is no folder.
        TensorFileError: ``resume`` is true and the folder holds no state, or that of another model.
        SpecError: the settings do not fit one another, the model, or this machine.
        UnsupportedModelError: the model cannot be given a two-way head.
    """
    folder = Path(folder)
    _check_folder(folder, config, resume)
    evaluation_images(config, "train")  # stimuli that cannot be made are named before a model is loaded
    accelerator = accelerator_for(config)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with _cpu_settings(config.threads), torch.random.fork_rng(devices):
        return _train(accelerator, config, folder, resume, command, progress)


class _Learner(nn.Module):
    """The objective as one module, so that several processes average its gradients."""

    def __init__(self, vit: HookedViT, probes: nn.Module | None, config: TrainingConfig) -> None:
        super().__init__()
        self.model, self.probes = vit.module, probes
        self.vit, self.config = vit, config

    def forward(self, batch: TaskBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        # On a CPU the fused kernel's backward is slower in bfloat16 than attention that is written out.
        slow = self.vit.device.type == "cpu" and self.config.precision == "bf16"
        with sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
            return tuple(objective(self.vit, self.probes, batch, self.config, step))  # type: ignore[return-value]


def _train(
    accelerator: Accelerator,
    config: TrainingConfig,
    folder: Path,
    resume: bool,
    command: str | None,
    progress: bool,
) -> TrainingResult:
    from tqdm.auto import tqdm

    main = accelerator.is_main_process
    vit = build_vit(config)
    normalization = normalization_of(vit) if isinstance(config.model, str) else NORMALIZATION
    _check_sites(vit, config)
    modules: dict[str, nn.Module] = {"model": vit.module}
    if config.auxiliary_weight:
        modules["probes"] = _build_probes(vit, config).requires_grad_(not config.freeze_probes)
    learner = accelerator.prepare(_Learner(vit, modules.get("probes"), config))
    parameters = [parameter for owner in modules.values() for parameter in owner.parameters()]
    native = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    optimizer = accelerator.prepare(native)
    schedule = Schedule(native, config)
    scaler: Any = accelerator.scaler
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"step": 0, "best_step": 0, "best": {}, "seconds": 0.0}
    if resume:
        state = load_state(folder / "state", modules, native)
        schedule.restore(state["step"], state.pop("schedule", {}))
        if scaler is not None:
            scaler.load_state_dict(state.pop("scaler"))
        if main:
            _keep_log(folder / "log.jsonl", state["step"])

    document = {"command": command, "config": config.model_dump(), "versions": versions(_LIBRARIES)}
    rank, processes = accelerator.process_index, accelerator.num_processes
    images = TrainingImages(config, normalization, rank=rank, processes=processes)
    held_out = evaluation_images(config, "val", normalization)
    vit.module.train()
    drops = vit.dropout() is not None
    began = time.perf_counter() - state["seconds"]
    first = state["step"]
    steps = tqdm(
        enumerate(images.steps(first), first),
        desc="train",
        unit="step",
        initial=first,
        total=config.steps,
        disable=not (progress and main),
    )
    with (folder / "log.jsonl").open("a" if resume else "w") if main else nullcontext() as log:
        for step, parts in steps:
            if drops:  # so that a resumed training drops what an uninterrupted one would have dropped
                torch.manual_seed((config.seed * config.steps + step) * processes + rank)
            lines = []
            for part, batch in enumerate(parts, 1):
                with accelerator.no_sync(learner) if part < len(parts) else nullcontext():
                    loss, line = learner(batch, step)
                    accelerator.backward(loss / len(parts))
                lines.append(line)
            norm = accelerator.clip_grad_norm_(parameters, config.clip or float("inf"))
            rate = schedule.rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.after_step()

            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                numbers = _means(accelerator, lines)
                numbers |= {"gradient_norm": float(norm or 0.0), "learning_rate": rate}
                _write_line(log, {"step": done, "seconds": time.perf_counter() - began, **numbers})
            if done % config.validate_every == 0 or done == config.steps:
                metrics = on_main(accelerator, lambda: evaluate(vit, held_out, config.validation_images))
                seconds = time.perf_counter() - began
                _write_line(log, {"step": done, "seconds": seconds, "validation": metrics})
                schedule.after_validation(metrics["accuracy"])
                if metrics["accuracy"] > state["best"].get("accuracy", -1.0):
                    state |= {"best": metrics, "best_step": done}
                    if main:
                        save_model(vit, config, folder, normalization)
                state |= {"step": done, "seconds": seconds}
                if main:
                    unseen: dict[str, Any] = {"schedule": kept} if (kept := schedule.state()) else {}
                    unseen |= {} if scaler is None else {"scaler": scaler.state_dict()}
                    save_state(folder / "state", modules, native, state | unseen)
                    write_json(folder / "training.json", document | {"progress": state})

    def test() -> dict[str, dict[str, float]]:
        best = load_trained(folder)
        best.module.to(accelerator.device)
        return {
            split: evaluate(
                best,
                evaluation_images(config, split, normalization),
                evaluation_count(config, split),
                progress=progress,
            )
            for split in config.test_splits
        }

    tested = on_main(accelerator, test)
    if main:
        write_json(folder / "training.json", document | {"progress": state, "test": tested})
    accelerator.end_training()
    return TrainingResult(folder, state["best_step"], state["best"], tested)


def _check_sites(vit: HookedViT, config: TrainingConfig) -> None:
    """Raise SpecError before the first step if a loss reads what the model or the task has not."""
    if config.auxiliary_weight:
        _check_probed(vit, config.auxiliary_site)
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


def _check_probed(vit: HookedViT, name: str) -> None:
    """Raise SpecError unless a site holds one embedding for every token."""
    sites, wanted = vit.expand([name]), [vit.layout.tokens.n_tokens, vit.layout.d_model]
    shape = list(vit.sites()[sites[0]].shape)
    if "*" in name or shape != wanted:
        has = "names several sites" if "*" in name else f"holds {shape} for an image"
        raise SpecError(
            f"auxiliary_site={name!r} {has}; the probes read one embedding for each token, {wanted}. Name "
            "one site such as blocks.1.resid_post, or set auxiliary_weight to 0."
        )


def _build_probes(vit: HookedViT, config: TrainingConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        return make_probes(
            config.auxiliary_probe,
            vit.layout.d_model,
            tokens_per_object=config.geometry.tokens_per_object,
            n_pairs=2 if config.task == "rmts" else 1,
        )


def _check_folder(folder: Path, config: TrainingConfig, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file, and a training takes a folder. Choose another name.")
    if not (folder / "training.json").exists():
        return
    if not resume:
        raise DataError(f"{folder} holds a training already. Resume it, or choose another folder.")
    before = Training.read(folder).config.model_dump()
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


def _means(accelerator: Accelerator, lines: list[dict[str, Tensor]]) -> dict[str, float]:
    """The numbers of a step, over its parts and over all processes."""
    means = {name: torch.stack([line[name] for line in lines]).mean() for name in lines[0]}
    return {name: float(accelerator.reduce(value, "mean")) for name, value in means.items()}


def _keep_log(path: Path, steps: int) -> None:
    """Drop what an interrupted run had logged after the state from which it resumes, and damaged lines."""
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(line for line in lines if line.endswith("\n") and _step(line) <= steps))


def _step(line: str) -> float:
    """The step that a line of the log is about; infinite if the line is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


def _write_line(log: Any, line: dict[str, Any]) -> None:
    if log is not None:
        log.write(json.dumps(line) + "\n")
        log.flush()
