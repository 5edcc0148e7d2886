"""Somebody's own ViT, with names of its own, and the row that describes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_mechinterp.model import Family, Port, Readout, TokenLayout


class Mixer(nn.Module):
    """Attention with one matrix for q, k and v, called past the module that holds it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Parameter(torch.randn(3 * width, width) / width**0.5)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm, with a branch module of its own kind."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_mix, self.before_ff = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = Mixer(width, heads)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.before_mix(x))
        return x + self.ff(self.before_ff(x))


class OwnViT(nn.Module):
    """4 x 4 patches of 8 px, then two summary tokens; the head reads the mean of those."""

    def __init__(self, width: int = 24, heads: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(3, width, 8, 8)
        self.positions = nn.Parameter(torch.randn(18, width))
        self.trunk = nn.ModuleList([Layer(width, heads) for _ in range(depth)])
        self.last_norm, self.classify = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = F.pad(self.patchify(images).flatten(2).mT, (0, 0, 0, 2)) + self.positions
        for layer in self.trunk:
            x = layer(x)
        return self.classify(self.last_norm(x)[:, -2:].mean(1))


def _readout(model: Any) -> Readout:
    ports = {"ln_final": Port("last_norm"), "pooled": Port("classify", "input"), "logits": Port("")}
    return Readout(None, ports)


OWN = Family(
    name="own.vit",
    library="own",
    blocks=("trunk",),
    attention="mix",
    out_projection="mix.out",
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("before_mix"),),
        "attn_out": (Port("mix"),),
        "resid_mid": (Port("before_ff", "input", in_place=True),),
        "ln2": (Port("before_ff"),),
        "mlp.pre": (Port("ff.0"),),
        "mlp.post": (Port("ff.2", "input"),),
        "mlp_out": (Port("ff"),),
        "resid_post": (Port(""),),
    },
    tokens=lambda model: TokenLayout((), (4, 4), (8, 8), (32, 32), ("summary", "summary")),
    d_model=lambda model: model.classify.in_features,
    heads=lambda attention: (attention.heads, attention.out.in_features // attention.heads),
    readout=_readout,
)
