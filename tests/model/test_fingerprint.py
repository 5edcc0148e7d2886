"""A model's digest changes if and only if what it computes may change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import vit_mechinterp as vmi
from tests.tiny_models import TIMM_PLAIN

CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a weight": lambda module: module.head.weight.data.add_(1e-3),
    "two rows": lambda module: module.head.weight.data.copy_(module.head.weight.data.flip(0)),
    "a buffer": lambda module: module.register_buffer("scale", torch.ones(())),
    "the number of heads": lambda module: setattr(module.blocks[0].attn, "num_heads", 6),
    "an epsilon": lambda module: setattr(module.norm, "eps", 1e-3),
    "the activation": lambda module: setattr(module.blocks[1].mlp, "act", nn.ReLU()),
    "the dtype": lambda module: module.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_changes_with_the_model(change: str) -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    before = vit.fingerprint()
    CHANGES[change](vit.module)
    assert vit.fingerprint() != before


def test_a_fingerprint_does_not_change_with_circumstances() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    before = vit.fingerprint()
    assert len(before) == 64
    vit.run(TIMM_PLAIN.images(1), ["*"])
    vit.module.train().requires_grad_(False)
    vit.module.set_grad_checkpointing(True)
    vit.module.blocks[0].attn.fused_attn = False
    assert vit.fingerprint() == before
    assert vmi.wrap(copy.deepcopy(vit.module)).fingerprint() == before
    assert vmi.wrap(TIMM_PLAIN.module()).fingerprint() == before
