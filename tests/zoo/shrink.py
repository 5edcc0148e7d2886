"""Any architecture of timm, tiny: the entry point of the name, with its configuration overridden.

What makes a family different survives: the block and attention classes, norms, scales and gates, prefix tokens,
rotary and relative positions, pooling, and differences between blocks. Grids are not square, so that rows and
columns cannot be mistaken for each other.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import timm
from timm.layers import HybridEmbed, StdConv2dSame
from timm.models import _registry
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

MODULES = (
    "vision_transformer",
    "eva",
    "deit",
    "vision_transformer_hybrid",
    "naflexvit",
    "vision_transformer_relpos",
    "vitamin",
    "beit",
    "qwen3_vit",
    "deepseek_vit",
    "gemma4_vit",
    "vision_transformer_sam",
    "cait",
    "xcit",
)
"""timm's modules whose every name is covered."""

N_CLASSES = 5


def names(module: str | None = None) -> list[str]:
    """The names that timm lists for a module, or for all covered ones."""
    modules = MODULES if module is None else (module,)
    return [name for name in timm.list_models() if module_of(name) in modules]


def module_of(name: str) -> str:
    """The timm module that defines a name."""
    return str(_registry._model_to_module[name])


def shrunk(name: str, **options: Any) -> nn.Module:
    """The architecture of a name with a few small blocks, weights as initialised, in eval mode."""
    module = module_of(name)
    overrides: dict[str, Any] = {"depth": 3, "embed_dim": 32, "num_heads": 4}
    if module not in ("vision_transformer_hybrid", "vitamin"):
        overrides |= {"patch_size": 8, "img_size": (16, 24)}
    overrides |= _SPECIAL.get(module, dict)()
    if not (module in ("qwen3_vit", "deepseek_vit", "gemma4_vit") and "_enc" in name):
        overrides["num_classes"] = N_CLASSES
    if module == "eva":
        overrides |= _eva(name)
    if module == "vision_transformer_hybrid":
        overrides |= _hybrid(name)
    if module in ("gemma4_vit", "naflexvit"):
        # These take images of any size and keep none; the pretrained configuration's counts.
        options = {"pretrained_cfg_overlay": {"input_size": (3, *overrides["img_size"])}, **options}
    return timm.create_model(name, pretrained=False, **{**overrides, **options}).eval()


def distinct(module: str) -> dict[str, tuple[str, ...]]:
    """The names of a module that shrink to models of their own, each with the others that shrink to the same.

    Names that differ in depth, width and image size alone are one architecture.
    """
    alike: dict[str, list[str]] = {}
    for name in names(module):
        alike.setdefault(structure(shrunk(name)), []).append(name)
    return {first: tuple(others) for first, *others in alike.values()}


def structure(module: nn.Module) -> str:
    """A digest of all that a model computes with, weights apart: classes, plain attributes, shapes, buffers."""
    digest = hashlib.sha256()
    for path, part in module.named_modules():
        plain = {name: _plain(value) for name, value in sorted(vars(part).items()) if name not in _LABELS}
        digest.update(f"{path} {type(part).__qualname__} {plain}".encode())
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
    for name, buffer in module.named_buffers():
        digest.update(f"{name} {tuple(buffer.shape)} {buffer.tolist()}".encode())
    return digest.hexdigest()


_LABELS = {"default_cfg", "pretrained_cfg"}


def _plain(value: Any) -> Any:
    """A number, a text, a sequence of these, or the name of a function; None for everything else."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return getattr(value, "__qualname__", None)


def _eva(name: str) -> dict[str, Any]:
    if "sapiens2" in name and "base" not in name:
        # As in the full models, only the blocks in the middle share keys and values between heads.
        return {"num_kv_heads": (4, 2, 4)}
    if "sapiens2" in name:
        return {"num_kv_heads": (4, 4, 4)}
    return {}


def _hybrid(name: str) -> dict[str, Any]:
    """A shallow backbone of the same kind: a deep one sees all of so small an image from every patch."""
    size: dict[str, Any] = {"img_size": (64, 96)}
    if "_mci_" in name:
        stem = ConvStem(
            channels=(8, 8, 32), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=nn.GELU
        )
        return size | {"embed_layer": partial(HybridEmbed, backbone=stem, proj=False)}
    if "_resnet" in name:
        backbone = timm.create_model("test_resnet", features_only=True, out_indices=[4])
        return {**size, "embed_layer": partial(HybridEmbed, backbone=backbone)}
    if "_r_" in name:
        return size
    stages = 4 if "_s32_" in name else 3
    size = {"img_size": (96, 128)}
    convolution = partial(StdConv2dSame, eps=1e-8)
    backbone = ResNetV2(
        layers=(1,) * stages, channels=(128,) * stages, num_classes=0, global_pool="", preact=False,
        stem_type="same", conv_layer=convolution,
    )  # fmt: skip
    return {**size, "embed_layer": partial(HybridEmbed, backbone=backbone)}


def _vitamin() -> dict[str, Any]:
    from timm.models.vitamin import VitCfg, VitConvCfg

    convolutions = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stem = VitCfg(
        embed_dim=(8, 16, 32), depths=(1, 1, 1), stem_width=8, conv_cfg=convolutions, head_type="1d"
    )
    return {"embed_cfg": stem, "img_size": (32, 48)}


_SPECIAL = {
    "vitamin": _vitamin,
    "vision_transformer_sam": lambda: {"window_size": 2, "global_attn_indexes": (1,), "img_size": (24, 40)},
    "qwen3_vit": lambda: {"img_size": (16, 32), "pos_embed_grid_size": 4, "out_features": 6},
    "deepseek_vit": lambda: {"out_features": 6},
    "gemma4_vit": lambda: {
        "img_size": (24, 48), "head_dim": 8, "intermediate_size": 24, "position_embedding_size": 16,
    },
}  # fmt: skip
