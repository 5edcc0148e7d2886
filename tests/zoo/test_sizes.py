"""Images of other sizes: where the native model takes them the layout follows, and elsewhere its reason is given."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import vit_mechinterp as vmi
from tests.tiny_models import stirred
from tests.zoo.shrink import MODULES, distinct, shrunk
from tests.zoo.test_timm import tiny
from tests.zoo.transformers_models import BUILDERS, build
from vit_mechinterp import HookedViT
from vit_mechinterp.errors import DataError, ExecutionError, SpecError
from vit_mechinterp.model.conformance import check

pytestmark = pytest.mark.zoo

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5, "patch_size": 8, "img_size": (16, 24)}


def other_sizes(vit: HookedViT) -> list[tuple[int, int]]:
    """More rows and more columns of patches, by different numbers; and twice as many."""
    tokens = vit.layout.tokens
    (height, width), (down, across) = tokens.image_size, tokens.patch_size
    return [(height + down, width + 2 * across), (2 * height, 2 * width)]


@torch.no_grad()
def takes(vit: HookedViT, size: tuple[int, int]) -> bool:
    """Whether the native model takes images of a size."""
    images = torch.zeros(1, *vit.layout.tokens.input_shape[:-2], *size)
    try:
        args, kwargs = vit.layout.family.inputs(vit.module, images)
        vit.module(*args, **kwargs)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def fault(vit: HookedViT) -> str:
    """What is wrong with a model at another size than its own; nothing, if it is right, or refused."""
    for size in other_sizes(vit):
        try:
            there = vmi.wrap(vit, image_size=size)
        except SpecError as error:
            text = str(error)
            if f"{size[0]} x {size[1]}" in text and ("whole groups of" in text or not takes(vit, size)):
                continue
            return text
        if not takes(vit, size):
            return f"images of {size} are accepted, and the model does not take them"
        tokens = there.layout.tokens
        if tokens.grid[-2:] != tuple(edge // p for edge, p in zip(size, tokens.patch_size, strict=True)):
            return f"{size}: {tokens}"
        report = check(there, subset="fast", progress=False)
        if not report.passed:
            return f"{size}: {report}"
        with pytest.raises(ExecutionError, match="need a wrapper of their own"):
            vit.run(there.blank(1), capture=["embed"])
        return ""
    return ""


@pytest.mark.parametrize("name", BUILDERS)
def test_transformers(name: str) -> None:
    assert not fault(vmi.wrap(build(name)))


@pytest.mark.parametrize("module", MODULES)
def test_timm(module: str) -> None:
    wrong = {name: found for name in distinct(module) if (found := fault(tiny(name)))}
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"],
)
@torch.no_grad()
def test_dynamic_image_sizes(name: str) -> None:
    module = stirred(timm.create_model(name, **{**SMALL, "dynamic_img_size": True})).eval()
    vit = vmi.wrap(module)
    assert vit.layout.tokens.grid == (2, 3)
    images = torch.randn(2, 3, 40, 32)
    assert torch.equal(vit(images), module(images))  # nothing is named by a place
    tall = vmi.wrap(vit, image_size=(40, 32))
    assert tall.layout.tokens.grid == (5, 4)
    assert check(tall, progress=False).passed
    run = vmi.Run(name="run", interventions=[vmi.Ablate(site="blocks.0.resid_post", tokens=[19])])
    results = vmi.execute(tall, [run], {"base": images}, progress=False)
    prefix = len(tall.layout.tokens.prefix)

    def zero(value: torch.Tensor) -> torch.Tensor:
        value[:, prefix + 19] = 0
        return value

    with tall.hooks({"blocks.0.resid_post": zero}):
        torch.testing.assert_close(results["run"], tall(images), rtol=0, atol=1e-5)
    assert float((results["run"] - module(images)).abs().max()) > 1e-4
    with pytest.raises(DataError, match=r"takes PIL images, .* or float tensors \(3, 16, 24\)"):
        vmi.execute(vit, [run.model_copy(update={"interventions": []})], {"base": images}, progress=False)


@torch.no_grad()
def test_images_of_another_size_are_refused_where_sites_are_named() -> None:
    vit = vmi.wrap(stirred(timm.create_model("vit_tiny_patch16_224", **SMALL, dynamic_img_size=True)).eval())
    wide = torch.randn(1, 3, 16, 32)
    message = r"images \[1, 3, 16, 32\], and its layout describes \[batch, 3, 16, 24\]: cls \+ 2x3 patches"
    with pytest.raises(ExecutionError, match=message):
        vit.run(wide, capture=["blocks.0.resid_post"])
    hooks = vit.hooks({"blocks.0.resid_post": torch.zeros_like})
    with hooks, pytest.raises(ExecutionError, match=r"wrap\(vit, image_size=\(height, width\)\)"):
        vit(wide)
    assert vit.run(wide)[0].shape == (1, 5)


def test_images_are_padded_to_whole_patches_where_the_module_does_so() -> None:
    module = timm.create_model("vit_tiny_patch16_224", **SMALL, dynamic_img_size=True, dynamic_img_pad=True)
    vit = vmi.wrap(stirred(module).eval(), image_size=(16, 26))
    assert vit.layout.tokens.grid == (2, 4)
    assert vit.layout.tokens.input_shape == (3, 16, 26)
    report = check(vit)
    assert report.passed, report


def naflex(name: str, **options: object) -> nn.Module:
    """A tiny NaFlexVit by the name of a plain model."""
    return stirred(timm.create_model(name, **{**SMALL, "use_naflex": True, **options})).eval()


@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch16_reg4_gap_256", "eva02_base_patch14_224"],
)
def test_plain_names_made_for_flexible_patches(name: str) -> None:
    module = naflex(name)
    vit = vmi.wrap(module)
    assert vit.layout.family.name == "timm.naflex"
    assert vit.layout.tokens.grid == (2, 3)
    report = check(vit, progress=False)
    assert report.passed, str(report)


@torch.no_grad()
def test_dicts_of_patches_are_refused_and_say_what_to_do() -> None:
    vit = tiny("naflexvit_base_patch16_gap")
    images = torch.randn(1, *vit.layout.tokens.input_shape)
    height, width = vit.layout.tokens.grid
    edge = vit.layout.tokens.patch_size[0]
    patches = images.unfold(2, edge, edge).unfold(3, edge, edge).permute(0, 2, 3, 4, 5, 1)
    given = {
        "patches": patches.reshape(1, height * width, -1),
        "patch_coord": torch.cartesian_prod(torch.arange(height), torch.arange(width))[None],
        "patch_valid": torch.ones(1, height * width, dtype=torch.bool),
    }
    torch.testing.assert_close(vit.module(given), vit(images), rtol=1e-4, atol=1e-4)
    for call in (vit, vit.run):
        with pytest.raises(ExecutionError, match="is given a dict of 'patches', 'patch_coord', 'patch_valid'"):
            call(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("vit_base_patch16_siglip_224", "map"),
        ("vit_base_patch16_siglip_gap_224", "avg"),
        ("vit_base_patch16_224", "token"),
        ("vit_medium_patch16_reg4_gap_256", "avg"),
        ("vit_small_patch16_224", "max"),
        ("vit_small_patch16_224", "avgmax"),
        ("eva02_tiny_patch14_224", "avg"),
        ("vit_so150m_patch16_reg4_map_256", "map"),
    ],
)
def test_every_way_of_pooling_with_one_image(name: str, pool: str) -> None:
    vit = vmi.wrap(stirred(shrunk(name, global_pool=pool)).eval())
    report = check(vit, progress=False)
    assert report.passed, str(report)
    one = torch.randn(1, *vit.layout.tokens.input_shape)
    with torch.no_grad():
        _, cache = vit.run(one, capture=["pooled"])
        assert torch.equal(vit(one), vit.module(one))
    assert cache["pooled"].shape[0] == 1
