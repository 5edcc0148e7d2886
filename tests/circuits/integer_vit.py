"""A two-block ViT of whole numbers whose every path can be computed on paper.

Four tokens of one pixel, no norms, uniform attention (queries and keys are zero), mean pooling. With A, B, C the means
of the three channels over the tokens, on images whose values are not negative:

    embed      (a, b, c, 0)
    head 0.0   A  -> dim 3          head 0.1   2 B -> dim 2       mlp 0   3 relu(dim 3) -> dim 1
    head 1.0   5 mean(dim 3) -> dim 0    head 1.1   mean(dim 1) -> dim 0    mlp 1   relu(dim 2) -> dim 0
    logit 0 = mean(dim 0) = A + 5 A + (B + 3 A) + (C + 2 B)       logit 1 = 7 mean(dim 3) = 7 A
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class NoNorm(nn.Identity):
    """An identity that takes a norm's arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


@torch.no_grad()
def integer_vit() -> VisionTransformer:
    """The model."""
    model = VisionTransformer(
        img_size=2, patch_size=1, embed_dim=4, depth=2, num_heads=2, mlp_ratio=1, num_classes=2, class_token=False,
        global_pool="avg", pos_embed="none", norm_layer=NoNorm, act_layer=nn.ReLU, fc_norm=False,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.zero_()
    for channel in range(3):
        model.patch_embed.proj.weight[channel, channel] = 1
    first, second = model.blocks
    value, head = 8, 2  # rows of qkv: 4 for q, 4 for k, 4 for v; two per head
    first.attn.qkv.weight[value, 0] = 1
    first.attn.proj.weight[3, 0] = 1
    first.attn.qkv.weight[value + head, 1] = 1
    first.attn.proj.weight[2, head] = 2
    first.mlp.fc1.weight[0, 3] = 1
    first.mlp.fc2.weight[1, 0] = 3
    second.attn.qkv.weight[value, 3] = 1
    second.attn.proj.weight[0, 0] = 5
    second.attn.qkv.weight[value + head, 1] = 1
    second.attn.proj.weight[0, head] = 1
    second.mlp.fc1.weight[0, 2] = 1
    second.mlp.fc2.weight[0, 0] = 1
    model.head.weight[0, 0] = 1
    model.head.weight[1, 3] = 7
    return model


def integer_images() -> dict[str, Tensor]:
    """Base with (A, B, C) = (1, 2, 3), source with (5, 1, 2); the tokens differ among themselves."""
    base = torch.tensor([[0, 0, 2, 2], [2, 2, 1, 3], [1, 5, 3, 3]])
    source = torch.tensor([[5, 7, 3, 5], [0, 2, 1, 1], [2, 0, 4, 2]])
    return {"base": base.reshape(1, 3, 2, 2).float(), "source": source.reshape(1, 3, 2, 2).float()}
