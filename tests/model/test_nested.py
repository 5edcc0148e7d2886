"""Instruments inside instruments: the inner one sees what the outer one wrote, whatever the row's hooks are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.model.test_conformance import made
from tests.model.test_conformance_lies import named, of_transformers
from vit_mechinterp.model.conformance.snapshot import differences, snapshot

SITES = ("resid_pre", "ln1", "attn.q", "attn.z", "attn_out", "resid_mid", "ln2", "mlp.post", "mlp_out", "resid_post")


@pytest.mark.parametrize(
    "build",
    [made, of_transformers("YolosModel"), of_transformers("VitPoseForPoseEstimation"), named("samvit_base_patch16")],
    ids=["timm", "recorded", "recorded backbone", "derived increments"],
)
@torch.no_grad()
def test_inner_captures_show_outer_edits(build: Callable[[], nn.Module]) -> None:
    module = build()
    vit = vmi.wrap(module)
    images = torch.randn(2, *vit.layout.tokens.input_shape)
    clean = vit.run(images, ["blocks.1.*"])[1]
    before = snapshot(module)
    for name in SITES:
        site = f"blocks.1.{name}"
        written: list[Tensor] = []

        def add(value: Tensor, written: list[Tensor] = written) -> Tensor:
            written.append(value + 1)
            return written[-1]

        with vit.hooks({site: add}), vit.hooks({site: add}):
            _, cache = vit.run(images, [site])
        assert len(written) == 2
        scale = float(clean[site].abs().max())
        torch.testing.assert_close(written[0], clean[site] + 1, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(cache[site], clean[site] + 2, rtol=0, atol=1e-5 * max(scale, 2.0))
    assert not differences(before, snapshot(module))


@torch.no_grad()
def test_a_derived_increment_read_inside_an_edit_behind_it_includes_that_edit() -> None:
    """Where nothing is read but the stream, an outer edit of resid_mid is part of the inner difference."""
    vit = vmi.wrap(named("samvit_base_patch16")())
    images = torch.randn(1, *vit.layout.tokens.input_shape)
    both = ["blocks.0.attn_out", "blocks.0.resid_mid"]
    clean = vit.run(images, both)[1]
    with vit.hooks({"blocks.0.resid_mid": lambda value: value + 1}):
        _, cache = vit.run(images, both)
    torch.testing.assert_close(cache[both[0]], clean[both[0]] + 1, rtol=0, atol=1e-4)
    seen: list[Tensor] = []
    hooks = {"blocks.0.resid_mid": lambda value: value + 1, "blocks.0.attn_out": seen.append}
    with vit.hooks(hooks):
        vit(images)
    torch.testing.assert_close(seen[0], clean[both[0]], rtol=0, atol=0)
