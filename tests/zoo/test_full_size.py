"""Architectures in their full size, weights as their library draws them: what shrinking might have hidden.

Left out of ``make test``; ``make test-full`` runs them one after the other, with the fast checks: all of them would take
some hundred forwards a model.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import nn

import vit_mechinterp as vmi
from vit_mechinterp.model.conformance import check

pytestmark = [pytest.mark.zoo, pytest.mark.full]

Build = Callable[[], nn.Module]


def of_timm(name: str, **options: object) -> Build:
    """A timm model by its name; the widest ones with few blocks."""
    return lambda: timm.create_model(name, pretrained=False, **options)


def of_transformers(model: str, config: str, **options: object) -> Build:
    """A transformers model from its default configuration, which is the base size."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


FULL: dict[str, tuple[Build, int | None, str]] = {
    "vit_base_patch16_224": (of_timm("vit_base_patch16_224"), None, "cls + 14x14 patches of 16x16 px"),
    "eva02_base_patch14_224": (of_timm("eva02_base_patch14_224"), None, "cls + 16x16 patches of 14x14 px"),
    "vit_small_patch16_dinov3": (
        of_timm("vit_small_patch16_dinov3"), None, "cls + 4 registers + 16x16 patches of 16x16 px",
    ),
    "vit_so400m_patch14_siglip_224": (
        of_timm("vit_so400m_patch14_siglip_224", depth=4), None, "16x16 patches of 14x14 px",
    ),
    "vit_giant_patch14_reg4_dinov2": (
        of_timm("vit_giant_patch14_reg4_dinov2", depth=2, img_size=224),
        None,
        "cls + 4 registers + 16x16 patches of 14x14 px",
    ),
    "Dinov2ForImageClassification": (
        of_transformers("Dinov2ForImageClassification", "Dinov2Config"), 224, "cls + 16x16 patches of 14x14 px",
    ),
    "CLIPVisionModel": (
        of_transformers("CLIPVisionModel", "CLIPVisionConfig"), None, "cls + 7x7 patches of 32x32 px",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_full_size(name: str) -> None:
    build, size, tokens = FULL[name]
    torch.manual_seed(0)
    vit = vmi.wrap(build().eval(), image_size=size)
    assert str(vit.layout.tokens) == tokens
    report = check(vit, subset="fast", progress=False)
    assert report.passed, str(report)
    images = torch.randn(1, *vit.layout.tokens.input_shape)
    assert torch.equal(vit(images), vit.run(images, capture=["blocks.*.resid_post", "blocks.*.attn.q"])[0])
    last = vit.layout.n_layers - 1
    sites = [f"blocks.{layer}.resid_post" for layer in sorted({0, last // 2, last})]
    runs = [vmi.Run(name=site, interventions=[vmi.Interchange(site=site, source="source")]) for site in sites]
    data = {"base": images, "source": images.flip(-1)}
    results = vmi.execute(vit, runs, data, progress=False)
    wanted = vit(data["source"]).float()
    scale = float(wanted.abs().max())
    assert float((vit(images) - wanted).abs().max()) > 1e-3 * scale
    for site in sites:  # the whole stream of another image gives the other image's output
        assert float((results[site] - wanted).abs().max()) <= 1e-5 * scale
