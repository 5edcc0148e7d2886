"""Rows that lie and models that fool a row: each fails at the site, with the number, and says how.

Every lie is one that goes unnoticed without conformance: the model runs, its output is right, and only what is
read or written is something else than its name says. The honest row of each model passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.model.test_conformance import made, seen, with_port
from tests.tiny_models import stirred
from tests.zoo.shrink import shrunk
from tests.zoo.transformers_models import build
from vit_mechinterp.model import Family, HookedViT, Port, TokenLayout
from vit_mechinterp.model.conformance import check
from vit_mechinterp.model.ports import Difference
from vit_mechinterp.model.resolve import resolve

Change = Callable[[Family], Family]


def named(name: str) -> Callable[[], nn.Module]:
    """A tiny timm model by its name, every parameter of which matters."""
    return lambda: stirred(shrunk(name)).eval()


def of_transformers(name: str) -> Callable[[], nn.Module]:
    """A tiny transformers model by its class."""
    return lambda: build(name)


def port(site: str, *ports: Port | Difference) -> Change:
    """A row with another port for a site."""
    return lambda family: with_port(site, *ports, family=family)


def fields(**changes: Any) -> Change:
    """A row with other fields."""
    return lambda family: replace(family, **changes)


def both(*changes: Change) -> Change:
    """Several changes of a row."""

    def change(family: Family) -> Family:
        for one in changes:
            family = one(family)
        return family

    return change


class InPlace(Block):
    """Adds to the residual stream in place, so that its input and its middle are one tensor."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        x = x.clone()
        x.add_(self.drop_path1(self.ls1(self.attn(self.norm1(x)))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class OneTensor(Block):
    """Returns the very tensor that it was given, changed in place."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        x += self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x += self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class WithWeights(Block):
    """Returns a pair, and the stream is not the first of it."""

    def forward(self, x: Any, attn_mask: Any = None, is_causal: bool = False) -> Any:
        x = x[1] if isinstance(x, tuple) else x
        return torch.zeros_like(x), super().forward(x)


class Unpacking(VisionTransformer):
    """Goes on with the second of what its blocks return."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x)[1]
        return self.forward_head(self.norm(x))


class ColumnsFirst(VisionTransformer):
    """Lays its square grid of patches out column by column."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "img_size": 24})
        embed = self.patch_embed.forward
        self.patch_embed.forward = lambda x: embed(x.transpose(-1, -2))


class Shuffling(VisionTransformer):
    """Drops patches at random, in eval mode as well."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        x = super()._pos_embed(x)
        return torch.cat([x[:, :1], x[:, 1 + torch.randperm(x.shape[1] - 1)]], dim=1)


def tokens(*prefix: str, grid: tuple[int, int] = (3, 5), suffix: tuple[str, ...] = ()) -> Change:
    return fields(tokens=lambda model: TokenLayout(prefix, grid, (8, 8), (24, 40), suffix))


@dataclass(frozen=True)
class Lie:
    """A model, what is changed about its row, and what must be said: check, site, and words of the line."""

    name: str
    model: Callable[[], nn.Module]
    change: Change
    check: str
    site: str
    text: str
    honest: bool = True
    """Whether the row as it stands describes the model."""

    def __str__(self) -> str:
        return self.name


HF_VIT = of_transformers("ViTForImageClassification")
SCALED = lambda: made(init_values=0.5)  # noqa: E731
EVA = named("eva02_tiny_patch14_224")
DINOV3 = named("vit_small_patch16_dinov3")
FIRES = "fires once, with its shape"
STREAM = "residual stream adds up"
DOWNSTREAM = "a write goes downstream only"
ATTENTION = "attention adds up"
MEANING = "names mean what they say"

LIES = (
    Lie(
        "qkv module that is bypassed", EVA, port("attn.v", Port("attn.qkv", heads="last")),
        FIRES, "blocks.0.attn.v", "fired 0 times",
    ),
    Lie(
        "dropout that is called twice", HF_VIT, port("attn_out", Port("dropout")),
        FIRES, "blocks.0.attn_out", "fired 2 times",
    ),
    Lie(
        "shared drop path, any call", named("cait_xxs24_224"), port("attn_out", Port("drop_path")),
        FIRES, "blocks.0.attn_out", "fired 2 times",
    ),
    Lie(
        "shared drop path, calls exchanged", named("cait_xxs24_224"),
        both(port("attn_out", Port("drop_path", call=1)), port("mlp_out", Port("drop_path", call=0))),
        STREAM, "blocks.0.resid_mid", "resid_pre + attn_out by",
    ),
    Lie(
        "shared drop path of sandwiched norms", named("gemma4_vit_167m"), port("mlp_out", Port("drop_path", call=0)),
        STREAM, "blocks.0.resid_post", "resid_mid + mlp_out by",
    ),
    Lie(
        "stream that is one tensor", lambda: made(OneTensor), lambda family: family,
        "captures stay as they were", "blocks.0.resid_pre", "the value by", honest=False,
    ),
    Lie(
        "difference of two names for one tensor", lambda: made(InPlace),
        port("attn_out", Difference("resid_mid", "ln1")),
        STREAM, "blocks.0.resid_mid", "resid_pre + attn_out by",
    ),
    Lie(
        "tuple whose first element is not the stream", lambda: made(WithWeights, Unpacking), lambda family: family,
        STREAM, "blocks.0.resid_post", "resid_mid + mlp_out by", honest=False,
    ),
    Lie(
        "blocks that return tensors, declared to return tuples", HF_VIT, fields(returns_tuple=True),
        "growth and skip", "", "Error",
    ),
    Lie(
        "recorded values from before the edit", of_transformers("VitPoseForPoseEstimation"), fields(recorded=False),
        "a write reaches the output", "blocks.2.resid_post", "the output did not change",
    ),
    Lie(
        "resid_mid written by replacing", made, port("resid_mid", Port("norm2", "input")),
        STREAM, "blocks.0.resid_post", "resid_mid + mlp_out by",
    ),
    Lie(
        "resid_mid written in a copy, with LayerScale", SCALED, port("resid_mid", Port("norm2", "input")),
        STREAM, "blocks.1.resid_post", "resid_mid + mlp_out by",
    ),
    Lie(
        "increment before LayerScale", SCALED, port("attn_out", Port("attn")),
        STREAM, "blocks.0.resid_mid", "resid_pre + attn_out by",
    ),
    Lie(
        "MLP increment before LayerScale", SCALED, port("mlp_out", Port("mlp")),
        STREAM, "blocks.0.resid_post", "resid_mid + mlp_out by",
    ),
    Lie(
        "heads without LayerScale", SCALED, fields(attention_scale=()),
        ATTENTION, "blocks.0.attn_out", "the heads' results with the bias by",
    ),
    Lie(
        "norms behind the branches, declared in front", lambda: made(ResPostBlock),
        fields(refuses=lambda model: None, parts={}),
        DOWNSTREAM, "blocks.0.ln1", "it did not move attn.q", honest=False,
    ),
    Lie(
        "norms in front, declared behind", made,
        both(port("ln1", Port("norm2")), port("ln2", Port("norm1"))),
        DOWNSTREAM, "blocks.0.ln1", "it did not move attn.q",
    ),
    Lie(
        "norm's input under the name of its output", made, port("ln1", Port("norm1", "input")),
        MEANING, "blocks.0.ln1", "it shows the values of blocks.0.resid_pre",
    ),
    Lie(
        "final norm's input under the name of its output", made,
        lambda family: replace(family, readout=lambda model: _with_final(family, model, Port("norm", "input"))),
        "ends of the stream", "ln_final", "it shows the values of blocks.1.resid_post",
    ),
    Lie(
        "MLP behind its activation", made, port("mlp.pre", Port("mlp.act")),
        MEANING, "blocks.0.mlp.post", "it shows the values of blocks.0.mlp.pre",
    ),
    Lie(
        "halves of a packed MLP exchanged", named("vit_giant_patch14_dinov2"),
        both(
            port("mlp.pre", Port("mlp.fc1", part=(1, 2))),
            port("mlp.pre_linear", Port("mlp.fc1", part=(0, 2))),
        ),
        MEANING, "blocks.0.mlp.pre_linear", "mlp.post, from twice what it was",
    ),
    Lie(
        "branches of a gated MLP with a norm exchanged", named("eva02_base_patch14_224"),
        both(port("mlp.pre", Port("mlp.fc1_x")), port("mlp.pre_linear", Port("mlp.fc1_g"))),
        MEANING, "blocks.0.mlp.pre_linear", "mlp.post, from twice what it was",
    ),
    Lie(
        "values taken from the queries", made, port("attn.v", Port("attn.qkv", heads="first")),
        ATTENTION, "blocks.0.attn.z", "pattern @ v by",
    ),
    Lie(
        "queries before their rotation", DINOV3, port("attn.q", Port("attn.q_norm", head_first=True)),
        "scores are q times k", "blocks.0.attn.q", "the scores, from the product of q and k, by",
    ),
    Lie(
        "wrong number of heads", made, fields(heads=lambda attention: (6, 4)),
        FIRES, "blocks.0.attn.q", "expected once, with (2, 16, 6, 4)",
    ),
    Lie(
        "prefix one token short", lambda: made(reg_tokens=2), tokens("cls", "registers"),
        "prefix + grid + suffix", "embed", "18 tokens, and the layout is cls + registers",
    ),
    Lie(
        "prefix one token short, made up by a suffix", lambda: made(reg_tokens=1), tokens("cls", suffix=("registers",)),
        "prefix + grid + suffix", "embed", "tokens outside the grid depend on the image",
    ),
    Lie(
        "grid on its side", made, tokens("cls", grid=(5, 3)),
        "prefix + grid + suffix", "embed", "of the image is token",
    ),
    Lie(
        "grid by columns", lambda: made(model=ColumnsFirst), lambda family: family,
        "prefix + grid + suffix", "embed", "patch (0, 2) of the image is token (2, 0) of the grid", honest=False,
    ),
    Lie(
        "patches shuffled at random", lambda: made(model=Shuffling), lambda family: family,
        "native output", "", "the output by", honest=False,
    ),
    Lie(
        "shuffling that is not pinned", of_transformers("ViTMAEModel"),
        fields(inputs=lambda module, x: ((x,), {})),
        "native output", "", "the output by",
    ),
    Lie(
        "images packed into one sequence, declared not to be", of_transformers("PixtralVisionModel"),
        fields(one_image=None),
        "growth and skip", "", "",
    ),
    Lie(
        "rows that are counted, declared not to be", named("deepseek_vit_412m"), fields(counts_rows=False),
        "growth and skip", "", "",
    ),
    Lie(
        "increment in windows", named("samvit_base_patch16"), port("attn_out", Port("drop_path1", spatial=True)),
        FIRES, "blocks.0.attn_out", "expected once, with (2, 15, 32)",
    ),
    Lie(
        "side by side, declared one after the other", named("vit_base_patch16_xp_224"), fields(parallel=False),
        DOWNSTREAM, "blocks.0.attn_out", "it did not move mlp.pre",
    ),
    Lie(
        "reason that is empty", made, fields(absent={"mlp.pre_linear": " "}),
        "a port or a reason", "blocks.0.mlp.pre_linear", "declared absent without a reason",
    ),
)  # fmt: skip


def _with_final(family: Family, model: nn.Module, final: Port) -> Any:
    readout = family.readout(model)
    return replace(readout, ports=MappingProxyType({**readout.ports, "ln_final": final}))


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_lie_fails_at_its_site(lie: Lie) -> None:
    module = lie.model()
    honest = vmi.wrap(module).layout.family if lie.honest else None
    family = honest or seen(made()).layout.family
    report = check(HookedViT(module, resolve(lie.change(family), module)), progress=False)
    found = [row for row in report.failures if row.check == lie.check]
    assert found, str(report)
    if lie.site:
        assert lie.site in {row.site for row in found}, str(report)
    assert any(lie.text in row.detail for row in found if lie.site in ("", row.site)), str(report)
    if " by" in lie.text:
        assert any(row.deviation for row in found if row.site == lie.site)


@pytest.mark.parametrize("model", {lie.model: lie for lie in LIES if lie.honest}.values(), ids=str)
def test_the_honest_row_passes(model: Lie) -> None:
    report = check(vmi.wrap(model.model()), progress=False)
    assert report.passed, str(report)
