"""Which tokens of the last block an output reads is found out by trying, and doubt means all of them."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.tiny_models import (
    HF_CLIP,
    HF_DINOV2,
    HF_VIT,
    TIMM_PLAIN,
    TIMM_POOLED,
    TIMM_REGISTERS,
    Tiny,
    stirred,
)
from tests.zoo.shrink import shrunk
from vit_mechinterp.model.output_tokens import output_tokens


@pytest.mark.parametrize(
    "tiny", [TIMM_PLAIN, TIMM_REGISTERS, HF_VIT, HF_CLIP, HF_DINOV2, TIMM_POOLED], ids=lambda tiny: tiny.name
)
def test_the_tokens_are_those_whose_change_moves_the_output(tiny: Tiny) -> None:
    vit = vmi.wrap(tiny.module())
    found = output_tokens(vit)
    x = tiny.images(1)
    last = f"blocks.{vit.layout.n_layers - 1}.resid_post"
    clean, moving = vit(x), []
    for token in range(tiny.n_tokens):

        def push(h: Tensor, token: int = token) -> None:
            h[:, token] += 3 * torch.randn(h.shape[-1], generator=torch.Generator().manual_seed(token))

        with torch.no_grad(), vit.hooks({last: push}):
            if not torch.allclose(vit(x), clean, atol=1e-5 * float(clean.abs().max())):
                moving.append(token)
    assert moving
    if len(moving) == tiny.n_tokens or moving[-1] >= len(tiny.prefix):
        assert found is None
    else:
        assert found is not None
        assert list(found.tokens) == moving


def test_two_tokens_are_read_where_there_are_two_heads() -> None:
    vit = vmi.wrap(stirred(shrunk("deit_tiny_distilled_patch16_224")).eval())
    found = output_tokens(vit)
    assert found is not None
    assert found.tokens == (0, 1)
    assert vit.layout.tokens.prefix == ("cls", "distillation")


def test_the_share_is_what_stands_behind_the_attention_call() -> None:
    found = output_tokens(vmi.wrap(TIMM_PLAIN.module()))
    d, tokens, hidden = 24, 17, 96
    whole = 3 * d * d + 2 * tokens * d + d * d + 2 * d * hidden
    assert found is not None
    assert found.share == pytest.approx((whole - 3 * d * d) / whole)
    assert found.share_behind_attention == pytest.approx(2 * d * hidden / whole)
    assert found.saved((0,)) == pytest.approx(found.share * 16 / 17)


def test_another_head_is_noticed() -> None:
    module: Any = TIMM_PLAIN.module()
    vit = vmi.wrap(module)
    assert output_tokens(vit) is not None
    module.global_pool = "avg"
    assert output_tokens(vit) is None
    module.global_pool = "token"
    assert output_tokens(vit) is not None


def of_timm(kind: type[nn.Module]) -> type[nn.Module]:
    """A class that passes for one of timm's own: modules of the user's are left whole without a trial."""
    kind.__module__ = "timm.layers"
    for method in vars(kind).values():
        if isinstance(method, FunctionType):
            method.__module__ = kind.__module__
    return kind


class Foreign(nn.Linear):
    """A head of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_modules_of_the_users_own_are_left_whole() -> None:
    module: Any = TIMM_PLAIN.module()
    assert output_tokens(vmi.wrap(module)) is not None
    module.head = Foreign(24, 5)
    assert output_tokens(vmi.wrap(module)) is None


@of_timm
class Mixing(nn.Module):
    """An MLP that hands the mean over tokens to each of them."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, mlp.act, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        return self.fc2(x + x.mean(dim=1, keepdim=True))


def test_a_block_that_mixes_tokens_behind_its_attention_is_left_whole() -> None:
    module: Any = TIMM_PLAIN.module()
    module.blocks[2].mlp = Mixing(module.blocks[2].mlp)
    assert output_tokens(vmi.wrap(module)) is None


@of_timm
class Shifting(nn.Module):
    """A module without parts that is not what it is for one token alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, dims=1)


@of_timm
class Faint(nn.Module):
    """Mixes tokens by less than the output shows, but not by nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-3 * x.mean(dim=1, keepdim=True)


@of_timm
class AmongPatches(nn.Module):
    """Leaves the first token alone, and mixes the others."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, 1:] - x[:, 1:].mean(dim=1, keepdim=True)], dim=1)


@of_timm
class ByPlace(nn.Module):
    """Adds to every token what belongs to its place."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[1], dtype=x.dtype)[:, None]


@pytest.mark.parametrize("part", [Shifting, Faint, AmongPatches, ByPlace])
def test_a_part_that_mixes_tokens_is_found_out(part: type[nn.Module]) -> None:
    module: Any = TIMM_PLAIN.module()
    vit = vmi.wrap(module)
    assert output_tokens(vit) is not None
    module.blocks[2].ls2 = part()
    assert output_tokens(vit) is None


def test_pooled_counts_as_read() -> None:
    """A classifier that ignores half of what is pooled does not make that half unread."""
    module: Any = HF_DINOV2.module()
    with torch.no_grad():
        module.classifier.weight[:, module.config.hidden_size :] = 0
    assert output_tokens(vmi.wrap(module)) is None


def test_a_trial_that_fails_costs_no_more_than_the_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = TIMM_PLAIN.module()
    vit = vmi.wrap(module)

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise AttributeError("a head that looks for what a block has left")

    fail.__module__ = "timm.models"
    with monkeypatch.context() as patch:
        patch.setattr(type(module), "forward_head", fail)
        assert output_tokens(vit) is None
    assert output_tokens(vit) is not None


def test_another_function_of_a_part_is_noticed() -> None:
    module: Any = TIMM_PLAIN.module()
    vit = vmi.wrap(module)
    assert output_tokens(vit) is not None
    mlp = module.blocks[2].mlp
    native = mlp.forward
    mlp.forward = lambda x: native(x) + x.mean(dim=1, keepdim=True)
    assert output_tokens(vit) is None
    del mlp.forward
    assert output_tokens(vit) is not None


@of_timm
class Zeroed(nn.Module):
    """Attention of the block's second kind, as an adapter begins: its projection is zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(24, 24)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x.mean(dim=1, keepdim=True))


def test_weights_that_no_longer_hide_what_a_part_does_are_noticed() -> None:
    module: Any = TIMM_PLAIN.module()
    module.blocks[2].ls2 = part = Zeroed()
    vit = vmi.wrap(module)
    assert output_tokens(vit) is not None
    part.proj.weight.data.normal_()  # which the parameter's own count of versions does not see
    assert output_tokens(vit) is None


def test_methods_of_the_users_own_are_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some read other tokens for some images alone, which no trial shows."""
    module: Any = TIMM_PLAIN.module()
    vit = vmi.wrap(module)
    native = module.forward_head

    def rarely(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moved = x + (x[:, :1, :7] > 0).all(dim=-1, keepdim=True) * x[:, 4:5]
        return native(moved, *args, **kwargs)

    assert output_tokens(vit) is not None
    module.forward_head = rarely
    assert output_tokens(vit) is None
    del module.forward_head
    assert output_tokens(vit) is not None
    with monkeypatch.context() as patch:
        patch.setattr(type(module), "forward_head", lambda self, x, **kwargs: rarely(x, **kwargs))
        assert output_tokens(vit) is None
    assert output_tokens(vit) is not None


def test_hooks_of_other_people_are_not_set_off_and_see_everything() -> None:
    module: Any = TIMM_PLAIN.module()
    vit = vmi.wrap(module)
    seen: list[Tensor] = []
    hook = module.blocks[2].mlp.register_forward_hook(lambda m, args, output: seen.append(output))
    assert output_tokens(vit) is None
    assert not seen
    hook.remove()
    assert output_tokens(vit) is not None
    hook = nn.modules.module.register_module_forward_hook(lambda m, args, output: seen.append(output))
    assert output_tokens(vit) is None
    assert not seen
    hook.remove()


def test_recording_hooks_of_transformers_are_no_obstacle() -> None:
    module: Any = HF_VIT.module()
    module(HF_VIT.images(1), output_hidden_states=True)
    assert any(part._forward_hooks for part in module.modules())
    assert output_tokens(vmi.wrap(module)) is not None


def test_nothing_is_left_behind() -> None:
    module = TIMM_PLAIN.module()
    vit = vmi.wrap(module)
    before = {name: dict(vars(part)) for name, part in module.named_modules()}
    assert output_tokens(vit) is not None
    assert {name: dict(vars(part)) for name, part in module.named_modules()} == before


def test_a_model_without_weights_is_not_tried() -> None:
    assert output_tokens(vmi.wrap(TIMM_PLAIN.module().to("meta"))) is None
