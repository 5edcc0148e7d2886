"""The oldest supported transformers: every architecture of the matrix that is there conforms, in the layout it has there.

What that version has not is skipped, with that as the reason. The current version has its own matrix.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import vit_mechinterp as vmi
from tests.zoo.transformers_models import BUILDERS, CLIP, PLAIN, TINY, build_from
from vit_mechinterp.errors import UnsupportedModelError
from vit_mechinterp.model.conformance import check

VERSION = transformers.__version__
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(VERSION >= "5", reason="the current version's matrix is test_transformers.py"),
]


def _own(package: str, name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A model whose configuration class stands in a module of its own, or that takes square images only."""

    def make() -> nn.Module:
        configuration = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
        modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        made: nn.Module = getattr(modeling, name)(getattr(configuration, config)(**options))
        return made

    return make


HERE: dict[str, Callable[[], nn.Module]] = {
    **BUILDERS,
    "ViTMAEModel": _own("vit_mae", "ViTMAEModel", "ViTMAEConfig", **PLAIN, mask_ratio=0.0),
    "Kosmos2VisionModel": _own("kosmos2", "Kosmos2VisionModel", "Kosmos2VisionConfig", **CLIP),
    "Idefics2VisionTransformer": _own("idefics2", "Idefics2VisionTransformer", "Idefics2VisionConfig", **PLAIN),
    "DINOv3ViTModel": _own("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", **PLAIN, num_register_tokens=2),
    "DINOv3ViTModel gated": _own(
        "dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", **PLAIN, use_gated_mlp=True
    ),
}
REFUSED = {
    "Qwen2": "with transformers 4 it is not covered",
    "Qwen3": "with transformers 4 it is not covered",
    "Glm4v": "with transformers 4 it is not covered",
}
"""Beginnings of names of towers whose batches transformers 4 lays out otherwise."""
OTHERWISE = {
    "VJEPA2": "its tiny form does not run in this version: d_head is too small for its rotation",
    "Ovis2": "in this version it puts out a bare tensor",
}
ALWAYS = [
    "ViTModel",
    "ViTForImageClassification",
    "DeiTModel",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "ViTMSNModel",
    "ViTMAEModel",
    "IJepaModel",
    "VivitModel",
    "BeitModel",
    "BeitForImageClassification",
    "Data2VecVisionModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "CLIPVisionModel",
    "SiglipVisionModel",
    "Siglip2VisionModel",
    "YolosModel",
    "DPTModel",
    "VideoMAEModel",
    "AltCLIPVisionModel",
    "ChineseCLIPVisionModel",
    "OwlViTVisionModel",
    "Owlv2VisionModel",
    "BlipVisionModel",
    "PixtralVisionModel",
]
"""What every supported version has, so that it is never skipped."""


def there(name: str) -> nn.Module:
    """The tiny model, or a skip that says that the version has none."""
    try:
        return build_from(HERE[name])
    except (ModuleNotFoundError, AttributeError) as error:
        if name in ALWAYS:
            raise
        pytest.skip(f"transformers {VERSION} has no {name}: {error}")


@pytest.mark.parametrize("name", HERE)
def test_conformance(name: str) -> None:
    module = there(name)
    if beginning := next((start for start in OTHERWISE if name.startswith(start)), None):
        pytest.skip(OTHERWISE[beginning])
    if beginning := next((start for start in REFUSED if name.startswith(start)), None):
        with pytest.raises(UnsupportedModelError, match=REFUSED[beginning]):
            vmi.wrap(module)
        return
    report = check(vmi.wrap(module), progress=False)
    assert report.passed, str(report)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "CLIPVisionModel", "BeitModel"])
def test_many_blocks_can_be_skipped(name: str) -> None:
    """A block that returns a tuple is skipped by one: what stands for it is indexed by the encoder, every time."""
    made = there(name)
    config = type(made.config).from_dict({**made.config.to_dict(), "num_hidden_layers": 7})
    torch.manual_seed(0)
    vit = vmi.wrap(type(made)(config).eval())
    generator = torch.Generator().manual_seed(1)
    base, source = (torch.randn(2, *vit.layout.tokens.input_shape, generator=generator) for _ in range(2))
    sites = [f"blocks.{layer}.resid_post" for layer in (4, 5)]
    swaps = [vmi.Interchange(site=site, tokens=[1], source="source") for site in sites]
    runs = [vmi.Run(name=swap.site, interventions=[swap]) for swap in swaps]
    results = vmi.execute(vit, runs, {"base": base, "source": source}, progress=False)
    place = len(vit.layout.tokens.prefix) + 1
    with torch.no_grad():
        _, cache = vit.run(source, capture=sites)
        for site, found in zip(sites, results.logits, strict=True):

            def exchange(value: torch.Tensor, site: str = site) -> torch.Tensor:
                value = value.clone()
                value[:, place] = cache[site][:, place]
                return value

            with vit.hooks({site: exchange}):
                wanted = vit(base)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            assert float((vit(base) - wanted).abs().max()) > 1e-4


def test_a_saved_model_loads(tmp_path) -> None:
    config = transformers.ViTConfig(**TINY, image_size=16, patch_size=8)
    torch.manual_seed(0)
    module = transformers.ViTForImageClassification(config).eval()
    module.save_pretrained(tmp_path)
    vit = vmi.load(f"hf/{tmp_path}")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(vit(x), module(x).logits)
