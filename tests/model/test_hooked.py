"""`HookedViT` against plain hooks, the libraries' eager attention, and a forward written out by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.model import raw
from tests.model.raw import moved, near
from tests.model.zoo import TIMM, VARIANTS, Variant
from tests.oracles import by_hand
from tests.tiny_models import HF_DINOV2, MAIN, TIMM_PLAIN, TIMM_REGISTERS, Tiny
from vit_mechinterp.errors import ExecutionError, SpecError, UnsupportedModelError, UnsupportedSiteError
from vit_mechinterp.model import HookedViT

MODELS = pytest.mark.parametrize("tiny", MAIN, ids=lambda tiny: tiny.name)


def images_for(vit: HookedViT, n: int = 2) -> Tensor:
    size = vit.layout.tokens.image_size
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_plain_hooks_see_the_same(variant: Variant) -> None:
    module = variant.module()
    vit = vmi.wrap(module)
    x = images_for(vit)
    run = lambda: raw.native(module, x, variant.output)  # noqa: E731
    clean = run()
    output, cache = vit.run(x, ["embed", "blocks.*.resid_*", "blocks.1.attn.pattern"])
    assert torch.equal(vit(x), clean)
    near(output, clean)
    assert torch.equal(vit.run(x, ["embed", "blocks.*.resid_*"])[0], clean)
    assert torch.equal(cache["embed"], raw.block_input(module, 0, run))
    assert torch.equal(cache["blocks.1.resid_pre"], cache["blocks.0.resid_post"])
    near(cache["blocks.0.resid_post"], raw.block_output(module, 0, run))
    near(cache["blocks.1.attn.pattern"], raw.patterns(module, x)[1], 2e-6)
    shift = torch.randn(cache["embed"].shape[1:], generator=torch.Generator().manual_seed(1))
    wanted = raw.with_block_output(module, 0, lambda value: value + shift, run)
    with vit.hooks({"blocks.0.resid_post": lambda value: value + shift}):
        assert torch.equal(vit(x), wanted)
    moved(wanted, clean)
    assert torch.equal(run(), clean)


@pytest.mark.parametrize("variant", [v for v in TIMM if "relative" not in v.name], ids=str)
@torch.no_grad()
def test_pattern_edits_are_those_of_unfused_attention(variant: Variant) -> None:
    module = variant.module()
    vit = vmi.wrap(module)
    x = images_for(vit)

    def edit(pattern: Tensor) -> Tensor:
        pattern = pattern.clone()
        pattern[:, 1, :, ::2] = 0
        return pattern

    with raw.unfused(module, lambda _, args, out: edit(out)):
        wanted = module(x)
    with vit.hooks({"blocks.*.attn.pattern": edit}):
        found = vit(x)
    near(found, wanted, 1e-5)
    moved(wanted, module(x))


@MODELS
@torch.no_grad()
def test_every_site_by_hand(tiny: Tiny) -> None:
    module = tiny.module()
    vit = vmi.wrap(module)
    x = tiny.images(2)
    values: dict[str, Tensor] = {}
    by_hand(module, x, lambda site, value: values.setdefault(site, value))
    _, cache = vit.run(x, ["*"])
    assert set(cache) == set(values) == set(vit.sites())
    for site, value in values.items():
        near(cache[site], value, 1e-5)
        assert tuple(value.shape[1:]) == vit.sites()[site].shape
        assert len(vit.sites()[site].axes) == value.ndim - 1


@MODELS
def test_gradients_reach_every_capture(tiny: Tiny) -> None:
    vit = vmi.wrap(tiny.module())
    x = tiny.images(2)
    output, cache = vit.run(x, ["*"])
    found = torch.autograd.grad(output.square().sum(), list(cache.values()))
    values: dict[str, Tensor] = {}

    def touch(site: str, value: Tensor) -> Tensor:
        values[site] = value.view_as(value)
        return values[site]

    wanted = torch.autograd.grad(by_hand(vit.module, x, touch).square().sum(), list(values.values()))
    for site, gradient in zip(values, wanted, strict=True):
        near(found[list(cache).index(site)], gradient, 1e-4)
        assert bool(gradient.any()), site


@torch.no_grad()
def test_runs_inside_hooks_see_the_edited_values() -> None:
    vit = vmi.wrap(TIMM_REGISTERS.module())
    x = TIMM_REGISTERS.images(2)
    sites = [
        f"blocks.1.{name}" for name in ("attn.q", "attn.z", "attn.pattern", "attn.result", "resid_mid", "ln2")
    ]
    for site in sites:
        edit: Callable[[Tensor], Tensor] = lambda value: value * 0.5  # noqa: E731
        values: dict[str, Tensor] = {}

        def touch(name: str, value: Tensor, site: str = site) -> Tensor:
            values[name] = value * 0.5 if name == site else value  # noqa: B023
            return values[name]  # noqa: B023

        wanted = by_hand(vit.module, x, touch)
        with vit.hooks({site: edit}):
            output, cache = vit.run(x, ["*"])
        near(output, wanted, 1e-5)
        for name, value in values.items():
            near(cache[name], value, 1e-5)
        moved(wanted, vit(x))


@torch.no_grad()
def test_nested_hooks_follow_each_other() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    x = TIMM_PLAIN.images(2)
    for site in ("blocks.0.attn.z", "blocks.0.resid_mid", "blocks.1.attn.result", "logits"):
        with vit.hooks({site: lambda value: value + 1}), vit.hooks({site: torch.square}):
            inner = vit(x)
        with vit.hooks({site: lambda value: (value + 1).square()}):
            near(inner, vit(x))
        with vit.hooks({site: lambda value: value.square() + 1}):
            moved(inner, vit(x))


@torch.no_grad()
def test_what_a_hook_keeps_is_what_it_saw() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    x = TIMM_PLAIN.images(2)
    sites = [site for site in vit.sites() if "blocks" not in site or "blocks.1" in site]
    _, clean = vit.run(x, sites)
    for site in sites:
        kept: list[Tensor] = []

        def hook(value: Tensor) -> Tensor:
            kept.append(value)  # noqa: B023
            return value * 0

        with vit.hooks({site: hook}):
            vit(x)
        near(kept[0], clean[site])


@pytest.mark.parametrize("tiny", [TIMM_REGISTERS, HF_DINOV2], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_hook_may_write_to_what_it_is_given(tiny: Tiny, mode: Callable[[], Any]) -> None:
    vit = vmi.wrap(tiny.module())
    x = tiny.images(2)

    def zero(value: Tensor) -> None:
        value[..., :4] = 0

    with mode():
        clean, cache = vit.run(x, ["blocks.0.resid_post"])
        for site in [site for site in vit.sites() if "blocks.1" in site and "scores" not in site]:
            with vit.hooks({site: zero}):
                found = vit(x)
            with vit.hooks({site: lambda value: torch.cat([value[..., :4] * 0, value[..., 4:]], dim=-1)}):
                near(found, vit(x))
            moved(found, clean)
        with vit.hooks({"blocks.1.resid_pre": zero}):
            assert torch.equal(
                vit.run(x, ["blocks.0.resid_post"])[1]["blocks.0.resid_post"], cache["blocks.0.resid_post"]
            )


def test_inference_mode_and_grad_mode_are_the_callers() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    x = TIMM_PLAIN.images(1)
    with torch.inference_mode():
        output, _ = vit.run(x, ["*"])
        assert output.is_inference()
        with vit.hooks({"blocks.0.resid_mid": lambda value: value * 2}):
            assert not torch.equal(vit(x), output)
    with torch.no_grad():
        assert not vit.run(x, ["*"])[0].requires_grad
    assert vit.run(x, ["*"])[0].requires_grad


def test_a_cache_is_a_mapping() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    _, cache = vit.run(TIMM_PLAIN.images(1), ["blocks.*.resid_post", "blocks.0.hook_resid_pre"])
    wanted = ["blocks.0.resid_pre", "blocks.0.resid_post", "blocks.1.resid_post", "blocks.2.resid_post"]
    assert list(cache) == wanted  # in forward order
    assert len(cache) == 4
    assert cache["blocks.0.hook_resid_post"] is cache["blocks.0.resid_post"]
    assert "blocks.0.ln1" not in cache
    assert "nonsense" not in cache
    first, *lines = repr(cache).splitlines()
    assert first == "ActivationCache of 4 sites:"
    assert lines[:2] == [
        "  blocks.0.resid_pre   (1, 17, 24) float32",
        "  blocks.0.resid_post  (1, 17, 24) float32",
    ]
    assert len(lines) == 4
    assert repr(vit.run(TIMM_PLAIN.images(1))[1]) == "ActivationCache of 0 sites"
    with pytest.raises(KeyError, match=r"blocks\.0\.resid_mid was not captured\. Close matches: .*resid_p"):
        cache["blocks.0.resid_mid"]


def test_names_may_be_one_string() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    assert list(vit.run(TIMM_PLAIN.images(1), "blocks.1.ln1")[1]) == ["blocks.1.ln1"]


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        (
            "blocks.0.resid_midd",
            SpecError,
            r"Unknown site 'blocks\.0\.resid_midd'\. Close matches: blocks\.0\.resid_mid",
        ),
        ("blocks.3.ln1", SpecError, r"layer 3 is out of range; VisionTransformer has 3 blocks, 0 to 2\."),
        (
            "blocks.0.mlp.pre_linear",
            UnsupportedSiteError,
            "does not exist on VisionTransformer: the MLP of this block is not gated",
        ),
        ("blocks.*.mlp.pre_linear", SpecError, r"matches no site\. Close matches"),
        ("blocks.0.hook_q_input", SpecError, "means something else in TransformerLens"),
    ],
)
def test_names_that_fit_nothing(name: str, error: type[Exception], text: str) -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    with pytest.raises(error, match=text):
        vit.run(TIMM_PLAIN.images(1), [name])
    with pytest.raises(error, match=text), vit.hooks({name: lambda value: value}):
        pass


@pytest.mark.parametrize(
    ("new", "text"),
    [
        (
            lambda value: value[:, :1],
            r"torch\.float32 of shape \(2, 1, 24\); expected torch\.float32 of shape \(2, 17, 24\), or None",
        ),
        (lambda value: value.double(), r"torch\.float64 of shape"),
        (lambda value: (value,), "tuple; expected"),
    ],
)
def test_hooks_must_return_what_fits(new: Callable[[Tensor], Tensor], text: str) -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    with (
        pytest.raises(ExecutionError, match=r"The hook at blocks\.1\.ln1 returned " + text),
        vit.hooks({"blocks.1.ln1": new}),
    ):
        vit(TIMM_PLAIN.images(2))


def test_a_site_that_no_forward_reaches_is_an_error() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    vit.module.blocks[1].forward = lambda x: x
    with pytest.raises(
        ExecutionError, match=r"Sites that did not fire once in each of 1 forwards .*blocks\.1\.ln1 \(0\)"
    ):
        vit.run(TIMM_PLAIN.images(1), ["blocks.1.ln1"])


@torch.no_grad()
def test_foreign_hooks_stay_and_are_seen() -> None:
    module = TIMM_PLAIN.module()
    vit = vmi.wrap(module)
    x = TIMM_PLAIN.images(2)
    clean = vit(x)
    calls: list[str] = []

    def foreign(_: nn.Module, args: object, output: Tensor) -> Tensor:
        calls.append("foreign")
        return output * 2

    handle = module.blocks[1].mlp.register_forward_hook(foreign)
    wanted = module(x)
    moved(wanted, clean)
    output, cache = vit.run(x, ["*"])
    near(output, wanted)
    near(cache["blocks.1.resid_mid"] + cache["blocks.1.mlp_out"], cache["blocks.1.resid_post"])
    assert torch.equal(vit(x), wanted)
    assert len(calls) == 3
    handle.remove()
    assert torch.equal(vit(x), clean)


@torch.no_grad()
def test_threads_wait_for_each_other() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    second = vmi.wrap(vit.module)
    assert second.lock is vit.lock
    x = TIMM_PLAIN.images(2)
    clean = vit(x)
    with vit.hooks({"logits": lambda value: value * 0}):
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(second(x)))
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
        assert not vit(x).any()
    thread.join()
    assert torch.equal(found[0], clean)


def test_train_mode_is_kept() -> None:
    module = TIMM[1].module().train()
    vit = vmi.wrap(module)
    assert vit.dropout() == "head_drop" or vit.dropout() is not None
    torch.manual_seed(5)
    state = torch.get_rng_state()
    sites = vit.sites()
    assert torch.equal(torch.get_rng_state(), state)
    assert sites["logits"].shape == (5,)
    assert module.training
    vit.run(images_for(vit), ["blocks.0.resid_mid"])
    assert module.eval() is module
    assert vit.dropout() is None


@torch.no_grad()
def test_half_precision_keeps_its_dtype() -> None:
    vit = vmi.wrap(HF_DINOV2.module(torch.bfloat16))
    x = HF_DINOV2.images(1).bfloat16()
    output, cache = vit.run(x, ["*"])
    assert {value.dtype for value in (output, *cache.values())} == {torch.bfloat16}
    assert vit.blank(1).dtype == torch.bfloat16


def test_gradient_checkpointing_is_refused_where_it_would_lie() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    vit.module.set_grad_checkpointing(True)
    x = TIMM_PLAIN.images(1)
    with pytest.raises(
        ExecutionError, match=r"uses gradient checkpointing.*Switch it off, or run under torch\.no_grad"
    ):
        vit.run(x, ["blocks.0.ln1"])
    with torch.no_grad():
        vit.run(x, ["blocks.0.ln1"])


def test_a_wrapper_says_what_it_is() -> None:
    vit = vmi.wrap(TIMM_REGISTERS.module())
    assert repr(vit) == (
        "HookedViT(VisionTransformer, timm.vit: 3 blocks, 3 heads of 8, width 24, "
        "cls + 3 registers + 3x5 patches of 8x8 px)"
    )
    notes = {name.removeprefix("blocks.0."): info.note for name, info in vit.sites().items()}
    assert notes["resid_mid"] == "a write moves the skip connection and the MLP"
    assert notes["attn.z"] == "read at the fused attention call"
    assert notes["ln1"] == ""


def test_only_known_libraries_have_a_preprocessing() -> None:
    from dataclasses import replace

    vit = vmi.wrap(TIMM_PLAIN.module())
    other = HookedViT(
        vit.module, replace(vit.layout, family=replace(vit.layout.family, name="mine", library="mine"))
    )
    with pytest.raises(
        UnsupportedModelError, match=r"No preprocessing is known for models of mine: .*\(3, 32, 32\)"
    ):
        other.preprocess  # noqa: B018


def test_a_hook_that_is_no_function_is_refused_before_the_block() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    with pytest.raises(SpecError, match=r"The hook at blocks\.0\.resid_post is 3; it must be a function"):
        vit.hooks({"blocks.0.resid_post": 3}).__enter__()  # type: ignore[dict-item]
