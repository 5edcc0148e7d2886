"""Rows that lie about the MLP's branches, the end of the stream or the readout: both subsets find them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
from timm.layers import SwiGLU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.model.test_conformance import made, seen
from tests.model.test_conformance_lies import FIRES, MEANING, SCALED, Lie, both, fields, named, port
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model import Family, HookedViT, Port
from vit_mechinterp.model.conformance import check
from vit_mechinterp.model.resolve import resolve

ENDS = "ends of the stream"
PACKED = named("vit_giant_patch14_dinov2")
GATED = lambda: made(mlp_layer=SwiGLU)  # noqa: E731
NORMED = named("eva02_base_patch14_224")


def rectified() -> nn.Module:
    """A packed gated MLP, the gate of which is linear from 0 upwards."""
    module = PACKED()
    for block in module.blocks:
        block.mlp.act = nn.ReLU()
    return module


class TwoStages(VisionTransformer):
    """Goes on behind the blocks of one list with those of another."""

    kind: type[nn.Module] = Block

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.more = nn.Sequential(*(self.kind(self.embed_dim, 3, qkv_bias=True) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.norm(self.more(self.blocks(self._pos_embed(self.patch_embed(x))))))


class Further(Block):
    """A class of its own."""


class TwoKinds(TwoStages):
    """The same with blocks of another class."""

    kind = Further


def readout(**ports: Port | str) -> Callable[[Family], Family]:
    """A row with other ports behind the blocks."""

    def change(family: Family) -> Family:
        def read(model: nn.Module) -> Any:
            own = family.readout(model)
            return replace(own, ports={**own.ports, **ports})

        return replace(family, readout=read)

    return change


LIES = (
    Lie(
        "second norm as the MLP's first layer", made, port("mlp.pre", Port("norm2")),
        MEANING, "blocks.0.mlp.pre", "it shows the values of blocks.0.ln2",
    ),
    Lie(
        "input of the MLP's first layer", made, port("mlp.pre", Port("mlp.fc1", "input")),
        MEANING, "blocks.0.mlp.pre", "it shows the values of blocks.0.ln2",
    ),
    Lie(
        "output of the MLP's second layer", made, port("mlp.post", Port("mlp.fc2")),
        MEANING, "blocks.0.mlp_out", "it shows the values of blocks.0.mlp.post",
    ),
    Lie(
        "output of the MLP's second layer, before LayerScale", SCALED, port("mlp.post", Port("mlp.fc2")),
        MEANING, "blocks.0.mlp.post", "it has 24 features, and mlp.pre 96",
    ),
    Lie(
        "gate whose linear branch is not declared", GATED,
        both(port("mlp.pre", Port("mlp.fc1_g")), port("mlp.pre_linear")),
        MEANING, "blocks.0.mlp.pre", "with the tokens of mlp.pre exchanged, mlp.post differs by",
    ),
    Lie(
        "linear branch as the only one", GATED,
        both(port("mlp.pre", Port("mlp.fc1_x")), port("mlp.pre_linear")),
        MEANING, "blocks.0.mlp.pre", "with the tokens of mlp.pre exchanged, mlp.post differs by",
    ),
    Lie(
        "linear branch as the only one, with a norm behind", NORMED,
        both(port("mlp.pre", Port("mlp.fc1_x")), port("mlp.pre_linear")),
        MEANING, "blocks.0.mlp.pre", "with the tokens of mlp.pre exchanged, mlp.post differs by",
    ),
    Lie(
        "branches exchanged", GATED,
        both(port("mlp.pre", Port("mlp.fc1_x")), port("mlp.pre_linear", Port("mlp.fc1_g"))),
        MEANING, "blocks.0.mlp.pre_linear", "mlp.post, from twice what it was",
    ),
    Lie(
        "branches exchanged, under a rectified gate", rectified,
        both(
            port("mlp.pre", Port("mlp.fc1", part=(1, 2))),
            port("mlp.pre_linear", Port("mlp.fc1", part=(0, 2))),
        ),
        MEANING, "blocks.0.mlp.pre_linear", "from its opposite where this is the opposite",
    ),
    Lie(
        "both halves of a packed MLP as one", PACKED, both(port("mlp.pre", Port("mlp.fc1")), port("mlp.pre_linear")),
        MEANING, "blocks.0.mlp.post", "the halves of a packed MLP",
    ),
    Lie(
        "first of two stages", lambda: made(model=TwoStages), lambda family: family,
        ENDS, "blocks.1.resid_post", "2 more Block run outside blocks: more.0, more.1", honest=False,
    ),
    Lie(
        "first of two stages of several kinds", lambda: made(model=TwoKinds), lambda family: family,
        ENDS, "blocks.1.resid_post", "goes on with it", honest=False,
    ),
    Lie(
        "first of two stages, at the last norm", lambda: made(model=TwoKinds), lambda family: family,
        ENDS, "ln_final", "norm reads something else than blocks.1.resid_post", honest=False,
    ),
    Lie(
        "norm of a block as the last", made, readout(ln_final=Port("blocks.1.norm2")),
        ENDS, "ln_final", "blocks.1.norm2 reads something else than blocks.1.resid_post",
    ),
    Lie(
        "norm of the first block as the last", made, readout(ln_final=Port("blocks.0.norm1")),
        "interchange of images", "ln_final", "the output by",
    ),
    Lie(
        "logits under the name of the pooled vector", made, readout(pooled=Port("head")),
        ENDS, "pooled", "it shows what vit(x) gives, which the row calls logits",
    ),
    Lie(
        "pooled vector under the name of the logits", made,
        readout(logits=Port("head", "input"), pooled="a reason of no weight at all"),
        ENDS, "logits", "vit(x) gives logits, and these are others: 2x24, where vit(x) is 2x5",
    ),
    Lie(
        "LayerScale that is not declared", SCALED, fields(attention_scale=()),
        "attention adds up", "blocks.0.attn_out", "('ls1.gamma' holds its values): declare its path from the block "
        "in attention_scale",
    ),
    Lie(
        "MLP's layer as the output projection", made, fields(out_projection="mlp.fc2"),
        FIRES, "blocks.0.attn.result", "out_projection='mlp.fc2' has not run where attn_out of block 0 is reached",
    ),
)  # fmt: skip


@pytest.mark.parametrize("subset", ["fast", "all"])
@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_lie_fails_at_its_site(lie: Lie, subset: Literal["all", "fast"]) -> None:
    module = lie.model()
    family = vmi.wrap(module).layout.family if lie.honest else seen(made()).layout.family
    report = check(HookedViT(module, resolve(lie.change(family), module)), subset=subset, progress=False)
    found = [row for row in report.failures if row.check == lie.check and row.site == lie.site]
    assert any(lie.text in row.detail for row in found), str(report)


@pytest.mark.parametrize("model", {lie.model: lie for lie in LIES if lie.honest}.values(), ids=str)
@pytest.mark.parametrize("subset", ["fast", "all"])
def test_the_honest_row_passes(model: Lie, subset: Literal["all", "fast"]) -> None:
    report = check(vmi.wrap(model.model()), subset=subset, progress=False)
    assert report.passed, str(report)


@pytest.mark.parametrize("size", [None, (16, 24)])
def test_where_several_sizes_are_taken_many_patches_are_not_needed(size: tuple[int, int] | None) -> None:
    module = made(img_size=(136, 144), dynamic_img_size=True)
    report = check(vmi.wrap(module), subset="fast", image_size=size, progress=False)
    assert report.passed, str(report)
    shown = "16 x 24" if size else "96 x 128"
    assert f"checked on images of {shown} (its own are 136 x 144)" in report.model
    fixed = vmi.wrap(made(img_size=(136, 144), depth=1))
    assert "checked on" not in check(fixed, subset="fast", progress=False).model
    with pytest.raises(SpecError, match="16 x 24"):
        check(fixed, image_size=(16, 24), progress=False)
