"""The models of Lepori et al. (2024) as ready-made settings: ``preset("clip-b16", seed=1)``.

Models, geometry and the set of 6,400 images follow the authors' code, and so do, for the pretrained models,
the defaults of its command line: AdamW, a constant learning rate of 2e-6 (1e-6 for DINOv2, which is in the
names of its checkpoints), 30 epochs of batches of 64, no clipping. What the paper itself states of this was
not at hand. Nothing is known of how long and how fast the models from scratch were trained: 200 epochs of
batches of 128 are in one of the authors' sweeps, the one-cycle schedule and its peak are this project's own.

DINOv2 interpolates its positions to the canvas. The authors' code draws new ones instead (its option
``ignore_mismatched_sizes`` drops positions that were made for other sizes), which is had with
``fresh_positions=True``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.training.config import EVALUATION_SPLITS, TrainingConfig

__all__ = ["PRESETS", "Preset", "preset"]

_IMAGES: Final = 6400
_COMMON: Final[dict[str, Any]] = {
    "canvas": 224,
    "train_images": _IMAGES,
    "validation_images": _IMAGES,
    "test_images": _IMAGES,
    "test_splits": EVALUATION_SPLITS,
    "auxiliary_weight": 0.0,
}
_FINE_TUNING: Final[dict[str, Any]] = {
    "batch_size": 64,
    "steps": 30 * (_IMAGES // 64),
    "learning_rate": 2e-6,
    "schedule": "constant",
    "clip": None,
    "validate_every": _IMAGES // 64,
}
_FROM_SCRATCH: Final[dict[str, Any]] = {
    "pretrained": False,
    "batch_size": 128,
    "steps": 200 * (_IMAGES // 128),
    "learning_rate": 1e-4,
    "schedule": "one_cycle",
    "validate_every": 5 * (_IMAGES // 128),
}


@dataclass(frozen=True)
class Preset:
    """Settings under a name.

    Attributes:
        label: how tables and figures call the model.
        pretraining: what its weights were trained on, in words; "none" from scratch.
        pretraining_images: how many images that is, as the model's publication gives it; 0 from scratch.
        settings: of `TrainingConfig`.
    """

    label: str
    pretraining: str
    pretraining_images: int
    settings: Mapping[str, Any] = field(repr=False)


def _tuned(model: str, patch: int = 16, cell: int = 32, **more: Any) -> dict[str, Any]:
    return {**_COMMON, **_FINE_TUNING, "model": model, "patch": patch, "cell": cell, **more}


def _scratch(model: str, patch: int, site: str) -> dict[str, Any]:
    # The site is where the authors' logs have the probes, for trainings with auxiliary_weight=1.
    return {**_COMMON, **_FROM_SCRATCH, "model": model, "patch": patch, "cell": 32, "auxiliary_site": site}


PRESETS: Final[Mapping[str, Preset]] = {
    "clip-b16": Preset(
        "CLIP ViT-B/16", "400M image-text pairs", 400_000_000, _tuned("hf/openai/clip-vit-base-patch16")
    ),
    "clip-b32": Preset(
        "CLIP ViT-B/32", "400M image-text pairs", 400_000_000, _tuned("hf/openai/clip-vit-base-patch32", 32)
    ),
    "imagenet21k-b16": Preset(
        "ImageNet ViT-B/16", "14M images with labels (ImageNet-21k)", 14_000_000,
        _tuned("hf/google/vit-base-patch16-224-in21k"),
    ),
    "dino-b16": Preset(
        "DINO ViT-B/16", "1.28M images (ImageNet-1k)", 1_280_000, _tuned("hf/facebook/dino-vitb16")
    ),
    "mae-b16": Preset(
        "MAE ViT-B/16", "1.28M images (ImageNet-1k)", 1_280_000,
        _tuned("hf/facebook/vit-mae-base", model_options={"mask_ratio": 0.0}),
    ),
    "dinov2-b14": Preset(
        "DINOv2 ViT-B/14", "142M images (LVD-142M)", 142_000_000,
        _tuned("hf/facebook/dinov2-base", 14, 28, learning_rate=1e-6),
    ),
    "scratch-b16": Preset(
        "from scratch, ViT-B/16", "none", 0,
        _scratch("timm/vit_base_patch16_224", 16, "blocks.1.resid_post"),
    ),
    "scratch-b32": Preset(
        "from scratch, ViT-B/32", "none", 0,
        _scratch("timm/vit_base_patch32_224", 32, "blocks.3.resid_post"),
    ),
}  # fmt: skip


def preset(name: str, **changes: Any) -> TrainingConfig:
    """Return the settings of a preset, some of them changed (``model="hf/./my-clip"`` for a local folder).

    Raises:
        SpecError: there is no such preset.
        ValidationError: a change names no setting, or does not fit.
    """
    return TrainingConfig.model_validate({**preset_settings(name), **changes})


def preset_settings(name: str) -> dict[str, Any]:
    """Return what a preset sets, its own name included, to be changed and validated.

    Raises:
        SpecError: there is no such preset.
    """
    if name not in PRESETS:
        raise SpecError(
            f"There is no preset {name!r}.{suggest(name, PRESETS)} Presets: "
            + "; ".join(f"{key} ({entry.label}: {entry.settings['model']})" for key, entry in PRESETS.items())
            + "."
        )
    return {**PRESETS[name].settings, "preset": name}
