"""Queries mean the same whether attention is fused or written out with the queries scaled first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.model.test_conformance import made
from tests.model.test_conformance_lies import named
from vit_mechinterp.model.conformance import check


def unfused(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return module


@pytest.mark.parametrize("build", [made, named("eva02_tiny_patch14_224"), named("vit_relpos_small_patch16_224")])
@torch.no_grad()
def test_fused_and_unfused_attention_show_the_same(build: Callable[[], nn.Module]) -> None:
    module = build()
    vit = vmi.wrap(module)
    images = torch.randn(2, *vit.layout.tokens.input_shape)
    sites = [f"blocks.{layer}.attn.{name}" for layer in (0, 1) for name in ("q", "k", "v", "scores", "pattern", "z")]
    fused = vit.run(images, sites)[1]
    native = unfused(module)(images)
    output, cache = vit.run(images, sites)
    assert torch.equal(output, native)
    for site in sites:
        torch.testing.assert_close(cache[site], fused[site], rtol=1e-4, atol=1e-5)
    for layer in (0, 1):
        q, k = cache[f"blocks.{layer}.attn.q"], cache[f"blocks.{layer}.attn.k"]
        assert float(q.abs().max()) > 0.1
        product = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        apart = (cache[f"blocks.{layer}.attn.scores"] - product).amax((0, 2, 3))
        if not hasattr(module.blocks[layer].attn, "rel_pos") or module.blocks[layer].attn.rel_pos is None:
            assert float(apart.abs().max()) < 1e-5


@torch.no_grad()
def test_an_edit_of_the_queries_is_the_same_in_both() -> None:
    module = made()
    vit = vmi.wrap(module)
    images = torch.randn(2, *vit.layout.tokens.input_shape)

    def add(q: Tensor) -> Tensor:
        return q + 1

    def edited() -> Tensor:
        with vit.hooks({"blocks.0.attn.q": add}):
            return vit(images)

    fused, clean = edited(), vit(images)
    unfused(module)
    torch.testing.assert_close(edited(), fused, rtol=1e-4, atol=1e-5)
    assert float((fused - clean).abs().max()) > 1e-3
    report = check(vit, progress=False)
    assert report.passed, str(report)
