"""What layouts state, and how a family's row is laid over a module."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

import vit_mechinterp as vmi
from tests.model.zoo import DINO, TIMM, hf, plain
from tests.tiny_models import MAIN, Tiny
from vit_mechinterp.adapters.timm_vit import VIT
from vit_mechinterp.errors import SpecError, UnsupportedModelError, UnsupportedSiteError
from vit_mechinterp.model import Port, TokenLayout
from vit_mechinterp.model.layout import is_missing, lookup
from vit_mechinterp.model.resolve import missing_for, resolve

TOKENS = TokenLayout(("cls", "registers", "registers"), (2, 3), (8, 4), (16, 12), ("probe",))


def test_tokens_are_prefix_grid_and_suffix() -> None:
    assert (TOKENS.n_patches, TOKENS.n_tokens) == (6, 10)
    assert TOKENS.names == ("all", "cls", "registers", "patches", "probe")
    assert TOKENS.positions("all") == list(range(10))
    assert TOKENS.positions("cls") == [0]
    assert TOKENS.positions("registers") == [1, 2]
    assert TOKENS.positions("patches") == [3, 4, 5, 6, 7, 8]
    assert TOKENS.positions("probe") == [9]
    assert TOKENS.positions("distillation") is None
    assert str(TOKENS) == "cls + 2 registers + 2x3 patches of 8x4 px + probe"


def test_video_grids_have_three_axes() -> None:
    video = replace(TOKENS, grid=(4, 2, 3), suffix=())
    assert (video.n_patches, video.n_tokens) == (24, 27)
    assert "4x2x3 patches" in str(video)
    assert video.resized((32, 12)).grid == (4, 4, 3)


def test_other_image_sizes_have_other_grids() -> None:
    assert TOKENS.resized((24, 20)).grid == (3, 5)
    assert TOKENS.resized((24, 20)).image_size == (24, 20)
    assert TOKENS.resized((31, 20)).grid == (3, 5)


@pytest.mark.parametrize("tiny", MAIN, ids=lambda tiny: tiny.name)
def test_layouts_state_what_the_models_are(tiny: Tiny) -> None:
    layout = vmi.wrap(tiny.module()).layout
    assert (layout.n_layers, layout.n_heads, layout.d_head) == (3, tiny.n_heads, tiny.d_head)
    assert layout.d_model == tiny.n_heads * tiny.d_head
    assert (layout.tokens.prefix, layout.tokens.grid) == (tiny.prefix, tiny.grid)
    assert layout.tokens.patch_size == (tiny.patch, tiny.patch)
    assert layout.tokens.image_size == tiny.image_size
    missing = {name.split(".", 2)[-1] if "blocks" in name else name for name in layout.absent}
    assert missing == set(tiny.missing)


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("mae", "ln_final", "its last norm acts on the pooled vector; read pooled"),
        ("dino", "logits", "the model has no head"),
        ("deit-distilled", "pooled", "two heads read two tokens; read ln_final"),
        ("unpooled", "pooled", "the model is made without pooling; read ln_final"),
        ("vit", "blocks.0.mlp.pre_linear", "the MLP of this block is not gated"),
    ],
)
def test_absent_sites_have_reasons(name: str, site: str, reason: str) -> None:
    vit = vmi.wrap(next(variant for variant in TIMM if variant.name == name).build().eval())
    with pytest.raises(UnsupportedSiteError) as raised:
        vit.run(vit.blank(1), [site])
    assert str(raised.value) == f"{site} does not exist on {type(vit.module).__name__}: {reason}."


def test_patches_of_a_convolutional_stem_are_given_in_pixels() -> None:
    hybrid = next(variant for variant in TIMM if variant.name == "hybrid")
    assert vmi.wrap(hybrid.build().eval()).layout.tokens.patch_size == (32, 32)


@pytest.mark.parametrize("build", [plain(dynamic_img_size=True), hf("Dinov2Model", "Dinov2Config", DINO)])
@torch.no_grad()
def test_models_of_any_size_are_wrapped_for_one(build: Any) -> None:
    module = build().eval()
    vit = vmi.wrap(module, image_size=(48, 24))
    assert vit.layout.tokens.grid == (6, 3)
    assert vit.sites()["embed"].shape[0] == 19
    assert vmi.wrap(vit) is vit
    assert vmi.wrap(vit, image_size=(48, 24)) is vit
    square = vmi.wrap(vit, image_size=32)
    assert square.layout == vmi.wrap(module).layout
    assert vit.layout.tokens.grid == (6, 3)
    report = vmi.model.conformance.check(vit)
    assert report.passed, str(report)


def test_models_of_one_size_say_so() -> None:
    with pytest.raises(
        SpecError, match=r"takes no images of 48 x 48 pixels: .* It is made for 32 x 32"
    ):
        vmi.wrap(plain()().eval(), image_size=48)


def test_paths_are_followed_as_far_as_they_go() -> None:
    module = plain()()
    assert lookup(module, "") is module
    assert lookup(module, "blocks.1.mlp.fc1") is module.blocks[1].mlp.fc1
    assert is_missing(lookup(module, "blocks.1.mlp.fc7"))
    assert is_missing(lookup(module, "attn_pool"))  # None


def test_ports_apply_where_their_attributes_are() -> None:
    block = plain(init_values=0.1)().blocks[0]
    assert Port("mlp.fc1").applies_to(block)
    assert not Port("ls1.gamma").applies_to(block)  # a parameter, no module
    assert Port("norm1", requires=(Port.has("ls1"), Port.has("attn.num_heads", 3))).applies_to(block)
    port = Port("norm1", requires=(Port.has("attn.num_heads", 4), Port.has("ls7")))
    assert not port.applies_to(block)
    assert port.needs == "'norm1' beside 'attn.num_heads = 4' and 'ls7'"


def test_every_block_is_looked_at() -> None:
    module = plain(depth=3)()
    module.blocks[2].mlp = nn.Identity()
    assert (
        missing_for(VIT, module)
        == "blocks.2 (Block) has no 'mlp.fc1_g' or 'mlp.fc1' beside 'mlp.gate_last = True' or 'mlp.fc1' beside 'mlp.gate_last = False' or 'mlp.fc1' or 'mlp.w0' for mlp.pre"
    )
    with pytest.raises(UnsupportedModelError, match=r"VisionTransformer is not a timm\.vit model: blocks\.2"):
        resolve(VIT, module)


def test_blocks_may_differ() -> None:
    import timm.layers

    module = plain()().eval()
    module.blocks[1].mlp = timm.layers.SwiGLU(24, 48)
    vit = vmi.wrap(module)
    assert [name for name in vit.sites() if "pre_linear" in name] == ["blocks.1.mlp.pre_linear"]


def test_projections_that_are_no_linear_layer_have_no_results_per_head() -> None:
    class LowRank(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x

    module = plain()().eval()
    module.blocks[1].attn.proj = LowRank(24, 24)
    vit = vmi.wrap(module)
    assert vit.layout.absent["blocks.1.attn.result"] == "attn.proj is a LowRank, no linear layer"
    assert "blocks.0.attn.result" in vit.sites()
    report = vmi.model.conformance.check(vit)
    assert report.passed, str(report)


def test_sites_that_a_family_does_not_declare_are_absent() -> None:
    ports = {
        site: found for site, found in VIT.ports.items() if site not in ("ln1", "resid_pre", "resid_mid")
    }
    family = replace(
        VIT, ports=MappingProxyType(ports), absent=MappingProxyType({"resid_mid": "it is a secret"})
    )
    layout = resolve(family, plain()())
    assert layout.absent["blocks.0.ln1"] == "timm.vit does not declare it"
    assert layout.absent["blocks.1.resid_mid"] == "it is a secret"
    assert layout.ports["embed"] == Port("blocks.0", "input")


def test_readers_that_fail_are_reasons() -> None:
    family = replace(VIT, heads=lambda attention: attention.n_heads)
    assert missing_for(family, plain()()) == (
        "its structure cannot be read (AttributeError: 'Attention' object has no attribute 'n_heads')"
    )
    assert missing_for(VIT, nn.Sequential()) == "no list of blocks at 'blocks'"
    assert missing_for(VIT, plain(depth=0)()) == "blocks is empty"
