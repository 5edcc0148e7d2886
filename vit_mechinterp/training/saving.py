"""Trained models as folders that `vit_mechinterp.load` takes: weights as safetensors, and preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from vit_mechinterp.errors import DataError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.loading import CHECKPOINTS, load
from vit_mechinterp.model.origins import is_folder
from vit_mechinterp.model.registry import wrap
from vit_mechinterp.stimuli.render import NORMALIZATION, Normalization
from vit_mechinterp.training.checkpoint import write_json
from vit_mechinterp.training.config import TrainingConfig
from vit_mechinterp.training.heads import LABELS
from vit_mechinterp.training.models import sizes_of

__all__ = ["load_trained", "save_model"]


def save_model(
    vit: HookedViT, config: TrainingConfig, folder: Path, normalization: Normalization = NORMALIZATION
) -> None:
    """Write ``model.safetensors`` and, for timm and transformers, what makes the folder one of theirs.

    The transform that it states is the stimuli's own: the whole image, scaled as in training. A reader sees
    the old files or the new ones, never half of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".saving"
    partial.mkdir(exist_ok=True)
    library = vit.layout.family.library
    if library == "transformers":
        _save_transformers(vit.module, config, partial, normalization)
    else:
        _save_weights(vit.module, partial / "model.safetensors")
        if library == "timm":
            write_json(partial / "config.json", _timm_document(vit, config, normalization))
    for file in sorted(partial.iterdir()):
        file.replace(folder / file.name)
    partial.rmdir()


def load_trained(folder: str | Path) -> HookedViT:
    """Load the best checkpoint of a training, whichever library its model is of.

    Folders with models of timm and transformers load with `vit_mechinterp.load` as well; torchvision has no
    folders, so its model is made by the name in ``training.json`` and given the weights.

    Raises:
        DataError: the folder holds no training's model.
    """
    folder = Path(folder).resolve()
    size = None
    if (folder / "training.json").is_file():
        document = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        config = TrainingConfig.model_validate(document["config"])
        size = config.canvas
        if isinstance(config.model, str) and config.model.startswith("torchvision/"):
            options: dict[str, Any] = {**config.model_options, "num_classes": len(LABELS)}
            name = config.model.partition(".")[0]
            weights = str(folder / "model.safetensors")
            return load(name, pretrained=False, image_size=size, checkpoint_path=weights, **options)
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder} holds no trained model: it has no config.json. Give the folder of a training that has "
            "reached its first validation."
        )
    vit = load(str(folder))
    return vit if size is None or not vit.layout.family.any_size(vit.module) else wrap(vit, image_size=size)


def _save_weights(module: nn.Module, file: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _save_transformers(
    module: Any, config: TrainingConfig, folder: Path, normalization: Normalization
) -> None:
    from transformers import ViTImageProcessor

    module.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": config.canvas, "width": config.canvas},
        image_mean=list(normalization.mean),
        image_std=list(normalization.std),
    ).save_pretrained(folder)


def _timm_document(vit: HookedViT, config: TrainingConfig, normalization: Normalization) -> dict[str, Any]:
    module: Any = vit.module
    own: dict[str, Any] = {}
    if isinstance(config.model, str):
        arguments = _timm_arguments(config.model) | dict(config.model_options) | {"num_classes": len(LABELS)}
        if "img_size" in arguments or tuple(module.default_cfg["input_size"][1:]) != (config.canvas,) * 2:
            arguments["img_size"] = config.canvas
        architecture, width = str(module.pretrained_cfg["architecture"]), int(module.num_features)
        kept = ("interpolation", "first_conv", "classifier", "license", "origin_url", "pool_size")
        own = {name: module.pretrained_cfg[name] for name in kept if module.pretrained_cfg.get(name)}
    else:
        arguments = sizes_of(config, config.model)
        architecture, width = config.model.architecture, config.model.embed_dim
        own = {"first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0"}
    return {
        "architecture": architecture,
        "num_classes": len(LABELS),
        "num_features": width,
        "label_names": list(LABELS),
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, config.canvas, config.canvas],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(normalization.mean),
            "std": list(normalization.std),
            "num_classes": len(LABELS),
            **own,
        },
    }


def _timm_arguments(name: str) -> dict[str, Any]:
    """Arguments that a model was made with beside its architecture's name, where its source states them."""
    library, _, rest = name.partition("/")
    if rest.startswith("hf-hub:"):
        from timm.models import load_model_config_from_hf

        return dict(load_model_config_from_hf(rest.removeprefix("hf-hub:"))[2] or {})
    if is_folder(name):
        rest = name
    folder = CHECKPOINTS / rest if library == "vmi" else Path(rest).expanduser()
    if library != "vmi" and not is_folder(rest):
        return {}
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_args") or {})
