"""Linear heads, and which tokens they read: found by trying them on random images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_mechinterp.bridges.agreement import difference, size, tolerance_of
from vit_mechinterp.bridges.weights import module_at, random_images
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.ports import Port, lookup

__all__ = ["NoNorm", "Readout", "final_norm", "readout_of"]


class NoNorm(nn.Module):
    """In the place of a norm, where the head reads the stream as it is."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = torch.ones(d)

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Readout:
    """A linear head behind one norm (or none), of one token or of a mean of tokens, or of both side by side.

    Attributes:
        norm: the norm.
        head: the head, on ``[part * d_model]`` features.
        shares: what every token counts for in each part of the head's input.
        behind: whether the norm comes behind the mean, and not before it.
    """

    norm: nn.Module
    head: nn.Linear
    shares: Float[Tensor, "part token"]
    behind: bool = False

    @property
    def token(self) -> int | None:
        """The token that the head reads, if it is one."""
        alone = len(self.shares) == 1 and int((self.shares != 0).sum()) == 1
        return int(self.shares[0].argmax()) if alone else None

    def pooled(self, stream: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch part d_model"]:
        """The mean, or the token, of each part."""
        return torch.einsum("pt,btd->bpd", self.shares.to(stream), stream)

    def __call__(self, stream: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch class"]:
        """The logits."""
        parts = self.norm(self.pooled(stream)) if self.behind else self.pooled(self.norm(stream))
        logits: Tensor = self.head(parts.flatten(1))
        return logits

    def directions(self, classes: Tensor) -> Float[Tensor, "*classes token d_model"]:
        """What a unit of each token's stream, centred and divided by the norm's scale, adds to a logit."""
        weight: Any = self.norm.weight
        rows = self.head.weight[classes].reshape(*classes.shape, len(self.shares), -1)
        return torch.einsum("pt,...pd->...td", self.shares.to(rows), rows * weight.to(rows))


@torch.no_grad()
def readout_of(vit: HookedViT) -> Readout | str:
    """The model's linear head and what it reads, or the reason why no such thing was found.

    It is held against the output of random images.
    """
    model, d = type(vit.module).__name__, vit.layout.d_model
    port = vit.layout.ports.get("pooled")
    head = lookup(vit.module, port.path) if isinstance(port, Port) and port.side == "input" else None
    if not isinstance(head, nn.Linear):
        return f"{model} has no head that is one linear layer; its output is {vit.layout.output}"
    last = f"blocks.{vit.layout.n_layers - 1}.resid_post"
    output, cache = vit.run(random_images(vit), capture=[last])
    inside = vit.layout.blocks_path + "."
    norms = [m for path, m in vit.module.named_modules() if _is_norm(m, d) and not path.startswith(inside)]
    for norm in [*norms, NoNorm(d)] if output.ndim == 2 else ():
        for shares in _poolings(vit):
            for behind in (False, True)[: 3 - len(shares)]:
                readout = Readout(norm, head, shares.to(vit.device), behind)
                if head.in_features != len(shares) * d:
                    continue
                if difference(readout(cache[last]), output) <= tolerance_of(vit) * size(output):
                    return readout
    return (
        f"the head of {model} does not read a token, or a mean of tokens, behind one norm (it attends to "
        "them, or does more), so a class has no direction in the residual stream"
    )


def final_norm(vit: HookedViT, readout: Readout | str) -> nn.Module | None:
    """The norm in front of the head, or else the one that makes ``ln_final``."""
    norm = readout.norm if isinstance(readout, Readout) else module_at(vit, "ln_final")
    return norm if norm is not None and _is_norm(norm, vit.layout.d_model) else None


def _poolings(vit: HookedViT) -> Iterator[Float[Tensor, "part token"]]:
    """Each token in front, the patches' mean, that of all tokens, and the first token beside the patches."""
    tokens = vit.layout.tokens
    each, start = torch.eye(tokens.n_tokens), len(tokens.prefix)
    patches = each[start : start + tokens.n_patches].mean(0)
    yield from each[:start, None]
    yield patches[None]
    if start:
        yield each.mean(0)[None]
        yield torch.stack([each[0], patches])


def _is_norm(module: nn.Module, d: int) -> bool:
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return named and isinstance(weight, Tensor) and tuple(weight.shape) == (d,)
