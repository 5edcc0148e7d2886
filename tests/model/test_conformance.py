"""Conformance can fail: models, rows and mechanisms broken on purpose, and the check that must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import vit_mechinterp as vmi
from tests.model.zoo import TIMM, TRANSFORMERS
from tests.tiny_models import stirred
from vit_mechinterp.adapters.timm_vit import VIT
from vit_mechinterp.adapters.transformers_vit import VIT as TRANSFORMERS_VIT
from vit_mechinterp.model import Family, HookedViT, Port, TokenLayout, instrument, tap, visiting
from vit_mechinterp.model.attention_call import AttentionCall
from vit_mechinterp.model.conformance import CHECKS, Report, check
from vit_mechinterp.model.interception import Interception
from vit_mechinterp.model.resolve import resolve


def made(
    block: type[nn.Module] = Block, model: type[VisionTransformer] = VisionTransformer, **options: Any
) -> nn.Module:
    """A stirred timm ViT, 3 x 5 patches, with another block or model class in place of timm's."""
    torch.manual_seed(0)
    settings = {
        "img_size": (24, 40),
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    }
    return stirred(model(**{**settings, "block_fn": block, **options})).eval()


def seen(module: nn.Module, family: Family = VIT) -> HookedViT:
    return HookedViT(module, resolve(family, module))


def with_port(site: str, *ports: Port, family: Family = VIT) -> Family:
    """A family with another port for one site."""
    return replace(family, ports=MappingProxyType({**family.ports, site: ports}))


def failing(report: Report, name: str) -> set[str]:
    """Sites at which a check failed; the other checks ran all the same."""
    assert set(CHECKS) - {"writes and identities"} <= {row.check for row in report.rows}
    assert not report.passed
    return {row.site for row in report.rows if row.check == name and not row.passed}


def test_what_is_broken_below_is_whole_otherwise() -> None:
    report = check(seen(made(init_values=0.5)))
    assert report.passed, str(report)


class BypassedMlp(nn.Module):
    """Calls its first layer's weight, and not the layer, as some libraries do with packed projections."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, mlp.act, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(F.linear(x, self.fc1.weight, self.fc1.bias)))


def test_a_site_that_never_fires() -> None:
    module = made()
    module.blocks[1].mlp = BypassedMlp(module.blocks[1].mlp)
    report = check(seen(module))
    assert failing(report, "fires once, with its shape") == {"blocks.1.mlp.pre"}
    assert {row.check for row in report.failures} == {"fires once, with its shape"}
    assert "fired 0 times" in report.failures[0].detail


def test_a_module_that_is_called_twice() -> None:
    module = next(variant for variant in TRANSFORMERS if variant.name == "ViTForImageClassification").module()
    family = with_port("attn_out", Port("dropout"), family=TRANSFORMERS_VIT)
    report = check(seen(module, family))
    assert "blocks.0.attn_out" in failing(report, "fires once, with its shape")
    assert "fired 2 times" in str(report)


def test_a_port_of_another_shape() -> None:
    report = check(seen(made(), with_port("mlp_out", Port("mlp.fc1"))))
    assert failing(report, "fires once, with its shape") == {"blocks.0.mlp_out", "blocks.1.mlp_out"}
    assert "expected once, with (2, 16, 24)" in str(report)


class SpelledOut(Attention):
    """Attention without any call that stands for it."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        weights = torch.einsum("bqhd,bkhd->bhqk", q * self.scale, k).exp()
        return self.proj(torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, True), v).flatten(2))


def test_attention_that_is_not_fused() -> None:
    module = made()
    module.blocks[1].attn.fused_attn = False
    assert check(seen(module)).passed
    module.blocks[1].attn.__class__ = SpelledOut
    report = check(seen(module))
    inside = {f"blocks.1.attn.{name}" for name in ("q", "k", "v", "scores", "pattern", "z")}
    assert failing(report, "fires once, with its shape") == inside
    assert "made 0 attention calls where one was expected" in str(report)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (
            TokenLayout(("cls", "registers"), (3, 5), (8, 8), (24, 40)),
            "16 tokens, and the layout is cls + registers",
        ),
        (TokenLayout((), (3, 5), (8, 8), (24, 40), ("cls",)), "tokens outside the grid depend on the image"),
        (TokenLayout(("cls",), (5, 3), (8, 8), (24, 40)), "of the image is token"),
    ],
)
def test_a_wrong_token_layout(tokens: TokenLayout, text: str) -> None:
    report = check(seen(made(), replace(VIT, tokens=lambda model: tokens)))
    assert failing(report, "prefix + grid + suffix") == {"embed"}
    assert text in str(report)


def test_a_wrong_number_of_heads() -> None:
    report = check(seen(made(), replace(VIT, heads=lambda attention: (6, 4))))
    assert "blocks.0.attn.q" in failing(report, "fires once, with its shape")


def test_a_wrapper_that_changes_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = seen(made())
    monkeypatch.setattr(HookedViT, "__call__", lambda self, x: self.module(x) * 1.0001)
    assert failing(check(vit), "native output") == {""}


def test_explicit_attention_that_forgets_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    module = next(variant for variant in TIMM if variant.name == "relative-positions").module()
    explicit = Interception._explicit

    def maskless(self: Any, call: AttentionCall) -> Tensor:
        return explicit(self, replace(call, attn_mask=None))

    monkeypatch.setattr(Interception, "_explicit", maskless)
    report = check(vmi.wrap(module))
    explicit_sites = {f"blocks.{layer}.attn.{name}" for layer in (0, 1) for name in ("scores", "pattern")}
    for name in ("capture only", "write back"):
        assert failing(report, name) == explicit_sites


def test_writes_that_lose_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = visiting._visit

    def rounding(port: Port, value: Tensor, visit: Callable[[Tensor], Tensor]) -> Tensor:
        new = whole(port, value, visit)
        return new if new is value else new.bfloat16().to(new.dtype)

    monkeypatch.setattr(visiting, "_visit", rounding)
    report = check(seen(made()))
    assert failing(report, "capture only") == set()
    assert "blocks.0.ln1" in failing(report, "write back")
    assert "blocks.0.attn.q" not in failing(report, "write back")


class InPlaceBlock(Block):
    """Adds to its input in place, so that what was captured there changes afterwards."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        x += self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def test_captures_that_change_afterwards() -> None:
    report = check(seen(made(InPlaceBlock)))
    assert "blocks.0.attn.q" in failing(report, "interchange with itself")
    assert "blocks.0.resid_pre" in failing(report, "captures stay as they were")


class WayAround(VisionTransformer):
    """Its head reads the patches of the image beside the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x).mean(1)
        x = self.forward_features(x)
        return self.head(x[:, 0] + patches)


def test_a_way_around_the_residual_stream() -> None:
    report = check(seen(made(model=WayAround)))
    assert {"embed", "blocks.1.resid_post", "ln_final"} <= failing(report, "interchange of images")
    assert "pooled" not in failing(report, "interchange of images")


class UnusedPortBlock(Block):
    """Calls a module and goes on with what went in."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        increment = self.ls1(self.attn(self.norm1(x)))
        self.drop_path1(increment)
        x = x + increment
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def test_a_write_that_is_lost() -> None:
    report = check(seen(made(UnusedPortBlock)))
    assert {"blocks.0.attn_out", "blocks.1.attn_out"} <= failing(report, "a write goes downstream only")
    assert failing(report, "write back") == set()
    assert "blocks.0.attn_out: it did not move resid_mid, resid_post" in str(report)


def test_a_write_that_goes_upstream() -> None:
    # The norm's input under the name of its output: ln1 is then upstream of resid_pre's readers, and is resid_pre.
    family = with_port("ln2", Port("norm1", "output"))
    report = check(seen(made(), family))
    assert "blocks.0.attn.q" not in failing(report, "a write goes downstream only")
    assert {"blocks.0.ln2", "blocks.0.resid_mid"} <= failing(report, "a write goes downstream only")


def test_a_write_that_misses_the_skip_connection() -> None:
    report = check(seen(made(), with_port("resid_mid", Port("norm2", "input"))))
    assert failing(report, "residual stream adds up") == {"blocks.0.resid_post", "blocks.1.resid_post"}
    assert failing(report, "write back") == set()


def test_an_increment_before_layer_scale() -> None:
    report = check(seen(made(init_values=0.5), with_port("attn_out", Port("attn"))))
    assert {"blocks.0.resid_mid", "blocks.1.resid_mid"} <= failing(report, "residual stream adds up")


def test_heads_without_layer_scale() -> None:
    report = check(seen(made(init_values=0.5), replace(VIT, attention_scale=())))
    assert failing(report, "attention adds up") == {"blocks.0.attn_out", "blocks.1.attn_out"}


def test_gates_under_each_others_names() -> None:
    module = next(variant for variant in TIMM if variant.name == "dinov2-giant").module()
    both = Port("mlp.fc1", part=(0, 2)), Port("mlp.fc1", part=(0, 2))
    family = with_port("mlp.pre", both[0], family=with_port("mlp.pre_linear", both[1]))
    report = check(seen(module, family))
    assert {"blocks.0.mlp.pre", "blocks.1.mlp.pre"} <= failing(report, "a write goes downstream only")


def test_a_pattern_edit_that_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Interception._visit

    def deaf(self: Any, site: str, x: Tensor) -> Tensor:
        new = whole(self, site, x)
        return x if site == "pattern" else new

    monkeypatch.setattr(Interception, "_visit", deaf)
    report = check(seen(made()))
    assert {"blocks.0.attn.z", "blocks.0.attn_out"} <= failing(report, "a pattern edit, by hand")
    assert {"blocks.0.attn.z", "blocks.1.attn.z"} == failing(report, "attention adds up")
    assert "blocks.0.attn.pattern" in failing(report, "a write goes downstream only")


class Truncated(VisionTransformer):
    """Runs its last block and ignores it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            last, x = x, block(x)
        return self.forward_head(self.norm(last))


def test_a_block_that_does_not_reach_the_output() -> None:
    report = check(seen(made(model=Truncated)))
    assert failing(report, "a write reaches the output") == {"blocks.1.resid_post"}


class Coupled(Block):
    """Takes the batch's mean away, so that rows depend on each other."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        return super().forward(x - 0.1 * x.mean(dim=0, keepdim=True))


def test_rows_that_depend_on_each_other() -> None:
    report = check(seen(made(Coupled)))
    assert failing(report, "single row") == {""}
    assert failing(report, "growth and skip")


class FixedBatch(VisionTransformer):
    """Relies on the batch size of the images to the end."""

    def forward(self, x: Tensor) -> Tensor:
        n_images = len(x)
        return super().forward(x).view(n_images, -1)


def test_a_batch_that_cannot_grow() -> None:
    report = check(seen(made(model=FixedBatch)))
    assert failing(report, "growth and skip")
    assert failing(report, "capture only") == set()


def test_a_head_that_is_all_zeros() -> None:
    module = made()
    nn.init.zeros_(module.head.weight)
    report = check(seen(module))
    assert "(is the head all zeros?)" in str(report)
    assert failing(report, "interchange of images")


def test_a_hook_that_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = seen(made())
    hooks = HookedViT.hooks

    @contextmanager
    def leaking(self: HookedViT, visitors: Any) -> Iterator[HookedViT]:
        with hooks(self, visitors):
            yield self
            self.module.blocks[0].register_forward_hook(lambda *_: None)

    monkeypatch.setattr(
        instrument.Instrument,
        "verify",
        lambda self, **_: self.module.norm.register_forward_hook(lambda *_: None),
    )
    assert failing(check(vit), "module unchanged") == {""}
    assert "changed: norm: _forward_hooks" in str(check(vit))


def test_a_forward_that_is_not_restored_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def careless(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
        vars(module)["forward"] = forward
        yield
        del vars(module)["forward"]

    monkeypatch.setattr(tap, "shadowed_forward", careless)
    report = check(seen(made()))
    assert failing(report, "module unchanged") == set()
    assert failing(report, "module unchanged after an exception")


class Restless(VisionTransformer):
    """Leaves its first block in train mode after the first forward."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            self.blocks[0].train()
        return super().forward(x)


def test_a_flag_that_changes() -> None:
    report = check(seen(made(model=Restless)))
    assert failing(report, "module unchanged") == {""}
    assert "blocks.0: train mode" in str(report)


def test_dropout_in_train_mode_is_refused_at_once() -> None:
    module = made(proj_drop_rate=0.1).train()
    report = check(seen(module))
    assert [row.check for row in report.rows] == ["eval mode"]
    assert "blocks.0.attn.proj_drop drops activations at random in train mode; call module.eval()" in str(
        report
    )
    assert not report.passed
    assert module.training


def test_a_model_that_does_not_run() -> None:
    module = made()
    module.norm = nn.LayerNorm(23)
    report = check(seen(module))
    assert not report.passed
    assert "first forward: RuntimeError" in str(report)


def test_load_and_wrap_refuse_what_does_not_conform() -> None:
    module = made(InPlaceBlock)
    assert isinstance(vmi.wrap(module), HookedViT)
    with pytest.raises(
        vmi.model.registry.UnsupportedModelError, match="VisionTransformer fails the conformance checks"
    ):
        vmi.wrap(module, check=True)
    with pytest.raises(vmi.model.registry.UnsupportedModelError, match="fails the conformance checks"):
        vmi.wrap(vmi.wrap(module), check=True)
    assert isinstance(vmi.wrap(made(), check=True), HookedViT)
