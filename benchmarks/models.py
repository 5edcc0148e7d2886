"""HuggingFace ViTs with random weights, and random images: no downloads, and every peer can run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SIZES", "Geometry", "build", "images", "pairs"]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a ViT."""

    width: int
    layers: int
    heads: int
    mlp: int
    image: int = 224
    patch: int = 16

    @property
    def patches(self) -> int:
        """Tokens that are patches."""
        return (self.image // self.patch) ** 2


SIZES = {
    "micro": Geometry(32, 3, 4, 64, image=32, patch=8),
    "vit_cifar": Geometry(192, 6, 3, 768, image=32, patch=4),
    "vit_tiny": Geometry(192, 12, 3, 768),
    "vit_small": Geometry(384, 12, 6, 1536),
    "vit_base": Geometry(768, 12, 12, 3072),
    "vit_large": Geometry(1024, 24, 16, 4096),
}


def build(
    size: str | Geometry,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    classes: int = 10,
) -> nn.Module:
    """A ``ViTForImageClassification`` in eval mode; the same weights at every call.

    Matrices are drawn with a gain of one, wider than a fresh model's, so that interventions have effects that
    are far above rounding.

    Args:
        size: a name in `SIZES`, or sizes.
        attention: ``"sdpa"`` (fused) or ``"eager"``.
        classes: number of outputs.
    """
    from transformers import ViTConfig, ViTForImageClassification

    g = SIZES[size] if isinstance(size, str) else size
    config = ViTConfig(
        hidden_size=g.width,
        num_hidden_layers=g.layers,
        num_attention_heads=g.heads,
        intermediate_size=g.mlp,
        image_size=g.image,
        patch_size=g.patch,
        num_labels=classes,
        initializer_range=g.width**-0.5,
        architectures=["ViTForImageClassification"],
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    module: nn.Module = ViTForImageClassification(config)
    return module.eval().to(device, dtype)


def images(module: nn.Module, n: int, seed: int) -> Tensor:
    """Random images ``[n, 3, height, width]`` on the module's device and in its dtype."""
    config: Any = module.config
    draw = torch.Generator().manual_seed(seed)
    parameter = next(module.parameters())
    size = (n, 3, config.image_size, config.image_size)
    return torch.randn(size, generator=draw).to(parameter.device, parameter.dtype)


def pairs(module: nn.Module, n: int, tokens: int = 4) -> dict[str, Tensor]:
    """Images ``base`` and ``source``, patch indices ``edited`` and ``source_tokens`` ``[n, tokens]``, a
    label."""
    config: Any = module.config
    patches = (config.image_size // config.patch_size) ** 2
    draw = torch.Generator().manual_seed(2)
    chosen = torch.stack([torch.randperm(patches, generator=draw)[:tokens] for _ in range(2 * n)])
    return {
        "base": images(module, n, 0),
        "source": images(module, n, 1),
        "edited": chosen[:n],
        "source_tokens": chosen[n:],
        "label": torch.randint(0, config.num_labels, (n,), generator=draw),
    }
