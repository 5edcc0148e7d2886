"""Checkpoints: the model as a folder that timm loads by ``local-dir:``, and the state that training resumes
from. Never pickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vit_mechinterp.errors import SpecError, TensorFileError
from vit_mechinterp.model.loading import load

if TYPE_CHECKING:
    from vit_mechinterp.training.config import TrainingConfig

__all__ = ["build_model", "load_state", "save_model", "save_state", "write_json"]

N_CLASSES = 2
LABELS = ["different", "same"]


def _model_args(config: TrainingConfig) -> dict[str, Any]:
    sizes = config.model.model_dump(exclude={"architecture"})
    return {"img_size": config.canvas, "patch_size": config.patch, "num_classes": N_CLASSES, **sizes}


def build_model(config: TrainingConfig) -> nn.Module:
    """Build the model with weights drawn from ``config.seed``, or with those of ``config.initial``; the
    global random state is left as it was.

    Raises:
        SpecError: ``config.initial`` is a model of other sizes.
    """
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module: nn.Module = timm.create_model(
            config.model.architecture, pretrained=False, **_model_args(config)
        )
    if config.initial is not None:
        weights = load(config.initial).module.state_dict()
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise SpecError(
                f"initial={config.initial!r} is a model of other sizes than the one to train ({error}). "
                "Give both the same sizes."
            ) from error
    return module


def save_model(module: nn.Module, config: TrainingConfig, folder: Path) -> None:
    """Write ``model.safetensors`` and ``config.json``; the folder loads with
    ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    The transform that the configuration states is the stimuli's own: full image, mean and standard deviation
    0.5.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    args = _model_args(config)
    document = {
        "architecture": config.model.architecture,
        "num_classes": N_CLASSES,
        "num_features": config.model.embed_dim,
        "label_names": LABELS,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, config.canvas, config.canvas],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": N_CLASSES,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        },
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    temporary = folder / "model.safetensors.part"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    write_json(folder / "config.json", document)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


def save_state(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write everything that training needs to go on: weights and optimiser moments as safetensors, the rest
    as JSON inside the same file.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{owner}/{name}": value.detach().cpu().contiguous()
        for owner, module in modules.items()
        for name, value in module.state_dict().items()
    }
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer/{index}/{name}": value.detach().cpu().contiguous() for name, value in moments.items()
        }
    temporary = folder / "state.safetensors.part"
    save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})
    temporary.replace(folder / "state.safetensors")


def load_state(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what `save_state` wrote into the modules and the optimiser, and return its ``progress``.

    Raises:
        TensorFileError: there is no state in the folder, it is damaged, or it belongs to other modules.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            progress: dict[str, Any] = json.loads(file.metadata()["progress"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TensorFileError(
            f"Training cannot resume: {path} is missing or damaged ({error}). Train without resuming."
        ) from error
    moments: dict[int, dict[str, Tensor]] = {}
    weights: dict[str, dict[str, Tensor]] = {owner: {} for owner in modules}
    for key, value in tensors.items():
        owner, _, name = key.partition("/")
        if owner == "optimizer":
            index, _, moment = name.partition("/")
            moments.setdefault(int(index), {})[moment] = value
        else:
            weights.setdefault(owner, {})[name] = value
    try:
        for owner, module in modules.items():
            module.load_state_dict(weights[owner])
    except RuntimeError as error:
        raise TensorFileError(
            f"Training cannot resume: {path} holds another model ({error}). Use its own settings."
        ) from error
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress
