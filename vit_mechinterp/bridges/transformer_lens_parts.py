"""The parts of a `TransformerLensViT`: which hook points there are, and the modules that hold them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vit_mechinterp.bridges.readouts import NoNorm
from vit_mechinterp.bridges.weights import AttentionWeights, attention_weights, output_weights
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT

__all__ = [
    "BLOCK_HOOKS",
    "PER_HEAD",
    "PLAIN_HOOKS",
    "SCALES",
    "AttentionPart",
    "NormPart",
    "is_rms",
    "scale_of",
]

BLOCK_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "ln1.hook_normalized": "ln1",
    "attn.hook_rot_q": "attn.q",
    "attn.hook_rot_k": "attn.k",
    "attn.hook_v": "attn.v",
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.pattern",
    "attn.hook_z": "attn.z",
    "attn.hook_result": "attn.result",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "ln2.hook_normalized": "ln2",
    "mlp.hook_pre": "mlp.pre",
    "mlp.hook_pre_linear": "mlp.pre_linear",
    "mlp.hook_post": "mlp.post",
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "resid_post",
}
"""Our name of every hook point of a block."""

PLAIN_HOOKS = {"attn.hook_q": "attn.q", "attn.hook_k": "attn.k"}
"""Those of blocks whose queries and keys enter the dot product as they are projected."""

SCALES = {"ln1.hook_scale": "resid_pre", "ln2.hook_scale": "resid_mid"}
"""What enters the norm of each scale."""

PER_HEAD = ("hook_q", "hook_k", "hook_rot_q", "hook_rot_k", "hook_v", "hook_z", "hook_result")
"""Hook points of ``[batch, token, head, features]``."""


class AttentionPart(nn.Module):
    """Hook points of one block's attention, and its weights in TransformerLens's shapes."""

    def __init__(self, vit: HookedViT, layer: int) -> None:
        super().__init__()
        self._vit, self._layer = vit, layer

    @cached_property
    def weights(self) -> AttentionWeights:
        """All projections; checked against the block's values when first asked for."""
        return attention_weights(self._vit, self._layer)

    @cached_property
    def output(self) -> tuple[Tensor, Tensor]:
        """``W_O`` and ``b_O``; checked against the block's increment when first asked for."""
        return output_weights(self._vit, self._layer)

    def __getattr__(self, name: str) -> Any:
        if name in ("W_O", "b_O"):
            return self.output[name == "b_O"]
        if name in AttentionWeights.__dataclass_fields__:
            return getattr(self.weights, name)
        return super().__getattr__(name)


class NormPart(nn.Module):
    """Hook points of one norm; called, it is the native norm."""

    def __init__(self, native: nn.Module | None, model: str) -> None:
        super().__init__()
        self._native, self._model = [native], model  # in a list, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        if self._native[0] is None:
            raise SpecError(
                f"No norm behind the blocks of {self._model} is known, which apply_ln needs here. Leave it "
                "out (apply_ln=False)."
            )
        y: Tensor = self._native[0](x)
        return y


def scale_of(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm divides its (centred) input by, ``[..., 1]``."""
    if isinstance(norm, NoNorm):
        return torch.ones_like(x[..., :1])
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-6))
    eps = torch.finfo(x.dtype).eps if eps is None else float(eps)
    centred = x if is_rms(norm) else x - x.mean(dim=-1, keepdim=True)
    return (centred.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


def is_rms(norm: nn.Module | None) -> bool:
    """Whether a norm leaves the mean where it is."""
    return isinstance(norm, NoNorm) or (norm is not None and "RMS" in type(norm).__name__.upper())
