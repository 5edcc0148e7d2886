"""Every ViT of torchvision, tiny: it conforms, also while torch computes attention in one kernel, and it loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

import vit_mechinterp as vmi
from tests.tiny_models import stirred
from vit_mechinterp.errors import SpecError, UnsupportedModelError
from vit_mechinterp.model.conformance import check
from vit_mechinterp.model.preprocess import Preprocess

BUILDERS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
TAPPED = ("q", "k", "v", "scores", "pattern", "z", "result")
TINY = {"num_layers": 3, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48, "num_classes": 5}


def tiny(name: str = "vit_b_16", **options: object) -> VisionTransformer:
    """The architecture of a builder with a few small blocks: 2 x 2 patches of the builder's own size."""
    patch = int(name.rsplit("_", 1)[1])
    torch.manual_seed(0)
    made = VisionTransformer(**{**TINY, "patch_size": patch, "image_size": 2 * patch, **options})
    return stirred(made).eval()


def images(module: VisionTransformer, n: int = 2) -> Tensor:
    size = module.image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


STEM = [
    ConvStemConfig(out_channels=8, kernel_size=3, stride=4),
    ConvStemConfig(out_channels=16, kernel_size=3, stride=4),
]


@pytest.mark.zoo
@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_conforms(name: str) -> None:
    report = check(vmi.wrap(tiny(name)))
    assert report.passed, str(report)


@pytest.mark.parametrize(
    "options",
    [{"representation_size": 12}, {"num_heads": 1}, {"conv_stem_configs": STEM}],
    ids=["a layer before the head", "one head", "a convolutional stem"],
)
def test_variants_conform(options: dict[str, object]) -> None:
    report = check(vmi.wrap(tiny(**options)))
    assert report.passed, str(report)


def test_a_model_without_a_head_conforms() -> None:
    module = tiny()
    module.heads = nn.Identity()
    vit = vmi.wrap(module)
    assert vit.layout.output == "pooled"
    assert check(vit).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_conform(dtype: torch.dtype) -> None:
    report = check(vmi.wrap(tiny().to(dtype)))
    assert report.passed, str(report)


def test_all_builders_are_covered() -> None:
    known = [name for name in models.list_models(module=models) if name.startswith("vit_")]
    assert sorted(BUILDERS) == sorted(known)


def test_the_layout() -> None:
    vit = vmi.wrap(tiny("vit_b_32", image_size=96))
    assert str(vit.layout) == (
        "torchvision.vit: 3 blocks, 4 heads of 8, width 32, cls + 3x3 patches of 32x32 px"
    )
    assert [name for name in vit.layout.absent if name.startswith("blocks.0")] == ["blocks.0.mlp.pre_linear"]


def by_hand(module: VisionTransformer, x: Tensor, layer: int) -> dict[str, Tensor]:
    """What happens inside one block's attention, from the weights alone."""
    block = module.encoder.layers[layer]
    normed = block.ln_1(x)
    attention = block.self_attention
    projected = normed @ attention.in_proj_weight.T + attention.in_proj_bias
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)) for part in projected.chunk(3, dim=-1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    pattern = scores.softmax(dim=-1)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
    weight = attention.out_proj.weight.unflatten(-1, (attention.num_heads, -1))
    result = torch.einsum("bqhd,mhd->bqhm", z, weight)
    attn_out = result.sum(dim=2) + attention.out_proj.bias
    return {"q": q, "k": k, "v": v, "scores": scores, "pattern": pattern, "z": z, "result": result} | {
        "attn_out": attn_out
    }


@pytest.mark.parametrize("gradients", [False, True])
def test_attention_is_what_the_weights_say(gradients: bool) -> None:
    module = tiny()
    vit, x = vmi.wrap(module), images(module)
    names = ["resid_pre", "attn_out", *(f"attn.{name}" for name in TAPPED)]
    with torch.set_grad_enabled(gradients):
        native = module(x)
        output, cache = vit.run(x, capture=[f"blocks.1.{name}" for name in names])
    wanted = by_hand(module, cache["blocks.1.resid_pre"], 1)
    for name, value in wanted.items():
        site = "blocks.1." + (name if name == "attn_out" else f"attn.{name}")
        torch.testing.assert_close(cache[site], value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, native, rtol=0, atol=3e-6 * float(native.abs().max()))


def test_without_a_tap_the_kernel_stays_and_the_output_is_bit_identical() -> None:
    """Without gradients attention is one kernel, which differs from separate calls by rounding."""
    module = tiny(num_layers=6)
    vit, x = vmi.wrap(module), images(module, 4)
    kernel = torch._native_multi_head_attention
    calls: list[int] = []

    def counting(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return kernel(*args, **kwargs)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_native_multi_head_attention", counting)
        native = module(x)
        output, _ = vit.run(x, capture=["blocks.*.resid_mid", "blocks.*.attn_out", "blocks.*.mlp.post"])
        assert len(calls) == 12
        vit.run(x, capture=["blocks.2.attn.z"])
        assert len(calls) == 17
    assert torch.equal(output, native)


def test_with_gradients_a_tap_changes_no_bit() -> None:
    module = tiny()
    vit, x = vmi.wrap(module), images(module)
    output, _ = vit.run(x, capture=["blocks.*.attn.q", "blocks.*.attn.z", "blocks.*.attn.result"])
    assert torch.equal(output, module(x))


def test_the_gradient_reaches_the_heads() -> None:
    module = tiny()
    output, cache = vmi.wrap(module).run(images(module), capture=["blocks.0.attn.z"])
    (gradient,) = torch.autograd.grad(output.sum(), cache["blocks.0.attn.z"])
    assert gradient.shape == (2, 5, 4, 8)
    assert float(gradient.abs().max()) > 0


def test_needed_weights_and_masks_are_those_of_torch() -> None:
    """A module of one's own may ask for the weights, mask keys, or attend to something else than itself."""
    from vit_mechinterp.model.multihead import opened

    torch.manual_seed(0)
    x, other = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask = torch.rand(5, 5) > 0.7
    mask.fill_diagonal_(False)
    padding = torch.tensor([[False] * 4 + [True], [False] * 5])
    calls = {
        "plain": ((x, x, x), {"need_weights": False}),
        "weights": ((x, x, x), {}),
        "weights of every head": ((x, x, x), {"average_attn_weights": False}),
        "masked": ((x, x, x), {"attn_mask": mask, "need_weights": False}),
        "masked for every head": ((x, x, x), {"attn_mask": mask.expand(8, 5, 5), "need_weights": False}),
        "padded": ((x, x, x), {"key_padding_mask": padding}),
        "both": ((x, x, x), {"attn_mask": mask, "key_padding_mask": padding}),
        "of another": ((x, other, other), {"need_weights": False}),
    }
    for batch_first in (True, False):
        for options in ({}, {"bias": False}, {"add_zero_attn": True}):
            attention = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options).eval()
            for name, (args, kwargs) in calls.items():
                given = args if batch_first else tuple(x.transpose(0, 1) for x in args)
                if len({id(x) for x in args}) == 1:
                    given = (given[0],) * 3
                with torch.no_grad():
                    wanted, weights = attention(*given, **kwargs)
                    found, own = opened(attention)(*given, **kwargs)
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=name)
                assert (own is None) == (weights is None)
                if weights is not None:
                    torch.testing.assert_close(own, weights, rtol=1e-5, atol=1e-6, msg=name)


def test_other_models_of_torchvision_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="No known family of ViTs describes"):
        vmi.load("torchvision/resnet18", pretrained=False)


def test_loads_by_name_and_from_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    options = {"num_classes": 5, "image_size": 32}
    vit = vmi.load("torchvision/vit_b_16", pretrained=False, **options)
    assert (vit.layout.n_layers, vit.layout.tokens.grid) == (12, (2, 2))
    stirred(vit.module)
    save_model(vit.module, str(tmp_path / "weights.safetensors"))
    again = vmi.load("torchvision/vit_b_16", checkpoint_path=tmp_path / "weights.safetensors", **options)
    x = images(vit.module)
    assert torch.equal(again(x), vit(x))
    assert float(vit(x).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("vit_b_16", {}, "vit_b_16-c867db91.pth and not in safetensors"),
        ("vit_b_16", {"checkpoint_path": "w.pth"}, "allow_pickle=True"),
        ("vit_b_61", {}, "torchvision has no model 'vit_b_61'. Close matches: vit_b_16"),
        ("vit_b_16.IMAGENET1K_V2", {}, "no weights 'IMAGENET1K_V2' of vit_b_16. Close matches: IMAGENET1K_V1"),
    ],
)
def test_what_cannot_be_loaded_is_refused(name: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(SpecError) as raised:
        vmi.load(f"torchvision/{name}", **options)
    assert text in str(raised.value)


@pytest.mark.parametrize("tag", ["IMAGENET1K_V1", "IMAGENET1K_SWAG_E2E_V1"])
def test_preprocessing_is_that_of_the_weights(tag: str) -> None:
    weights = models.ViT_B_16_Weights[tag]
    size = weights.meta["min_size"][0]
    module = tiny(image_size=size)
    picture = Image.effect_noise((300, 260), 80).convert("RGB")
    made = Preprocess.from_torchvision(module, f"vit_b_16.{tag}")
    assert torch.equal(made([picture])[0], weights.transforms()(picture))
    resized = Preprocess.from_torchvision(tiny(image_size=32))
    assert resized([picture.convert("L")]).shape == (1, 3, 32, 32)
    assert resized.geometry.unknown is None
