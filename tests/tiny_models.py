"""Tiny native ViTs from configurations: nothing is downloaded, and every parameter matters to the output.

Freshly initialised weights are so small that most interventions would hardly change the output, so all parameters are
drawn anew, wide enough for uneven attention patterns, from a seed that belongs to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

N_LAYERS = 3


@dataclass(frozen=True)
class Tiny:
    """A recipe for a tiny model, and what is true of it.

    ``prefix`` names the tokens before the patches, ``missing`` the sites (without their layer) that it lacks.
    """

    name: str
    build: Callable[[], nn.Module]
    prefix: tuple[str, ...]
    grid: tuple[int, int]
    patch: int
    n_heads: int
    d_head: int
    missing: tuple[str, ...] = ()

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module in eval mode; the same weights at every call."""
        torch.manual_seed(0)
        return stirred(self.build()).eval().to(dtype)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def n_tokens(self) -> int:
        return len(self.prefix) + self.grid[0] * self.grid[1]

    def images(self, n: int, seed: int = 0) -> Tensor:
        """Random images ``[n, 3, height, width]``."""
        return torch.randn(n, 3, *self.image_size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stirred(module: nn.Module) -> nn.Module:
    """Draw all parameters anew: matrices of gain 1.6, everything else around its usual value."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if name.endswith(("gamma", "lambda1")):
            parameter.copy_(0.7 + 0.2 * noise)
        elif parameter.ndim >= 2 and "token" not in name and "pos" not in name and "embedding" not in name:
            parameter.copy_(noise * 1.6 / parameter[0].numel() ** 0.5)
        elif name.endswith("weight") and "norm" in name:
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.3 * noise)
    return module


def _timm(**options: Any) -> Callable[[], nn.Module]:
    return lambda: VisionTransformer(
        **{"embed_dim": 24, "depth": N_LAYERS, "num_heads": 3, "num_classes": 5, **options}
    )


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=N_LAYERS, num_attention_heads=4, intermediate_size=40, image_size=32,
            patch_size=8, num_labels=5,
        )
    )  # fmt: skip


def _dinov2() -> nn.Module:
    return transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=24, num_hidden_layers=N_LAYERS, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8,
            num_register_tokens=2, use_swiglu_ffn=True, num_labels=4,
        )
    )  # fmt: skip


def _clip() -> nn.Module:
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=24, num_hidden_layers=N_LAYERS, num_attention_heads=3, intermediate_size=40, image_size=32,
            patch_size=8, projection_dim=6, hidden_act="quick_gelu",
        )
    )  # fmt: skip


TIMM_PLAIN = Tiny(
    "timm-plain", _timm(img_size=32, patch_size=8), ("cls",), (4, 4), 8, 3, 8, ("mlp.pre_linear",)
)
TIMM_REGISTERS = Tiny(
    "timm-registers",
    _timm(
        img_size=(24, 40), patch_size=8, reg_tokens=3, init_values=0.5, qk_norm=True, mlp_ratio=2,
        mlp_layer=timm.layers.SwiGLUPacked,
    ),
    ("cls", "registers", "registers", "registers"),
    (3, 5),
    8,
    3,
    8,
)  # fmt: skip
TIMM_POOLED = Tiny(
    "timm-pooled",
    _timm(img_size=32, patch_size=8, class_token=False, global_pool="avg"),
    (),
    (4, 4),
    8,
    3,
    8,
    ("mlp.pre_linear", "ln_final"),
)
HF_VIT = Tiny("hf-vit", _vit, ("cls",), (4, 4), 8, 4, 8, ("mlp.pre_linear",))
HF_DINOV2 = Tiny("hf-dinov2-registers", _dinov2, ("cls", "registers", "registers"), (4, 4), 8, 2, 12)
HF_CLIP = Tiny("hf-clip", _clip, ("cls",), (4, 4), 8, 3, 8, ("mlp.pre_linear", "ln_final"))

MAIN = (TIMM_PLAIN, TIMM_REGISTERS, HF_VIT, HF_DINOV2, HF_CLIP)
