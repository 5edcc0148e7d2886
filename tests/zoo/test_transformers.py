"""Every transformers architecture that is covered: conformance, and what the engine makes of a small sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import vit_mechinterp as vmi
from tests.zoo.transformers_models import BUILDERS, build, build_from
from vit_mechinterp.errors import UnsupportedModelError
from vit_mechinterp.model.conformance import check

pytestmark = pytest.mark.zoo

PLACES = (
    "resid_pre",
    "attn.q",
    "attn.pattern",
    "attn.z",
    "attn_out",
    "resid_mid",
    "mlp.post",
    "mlp_out",
    "resid_post",
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small only lose by threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def block_classes() -> dict[str, str]:
    """The class of every covered model's blocks, by builder name."""
    found = {}
    for name in BUILDERS:
        vit = vmi.wrap(build(name))
        block = vit.module.get_submodule(vit.layout.block_path(0))
        found[name] = type(block).__name__
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_conformance(name: str) -> None:
    report = check(vmi.wrap(build(name)))
    assert report.passed, str(report)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_sweep_equals_one_run_at_a_time(name: str) -> None:
    vit = vmi.wrap(build(name))
    layout = vit.layout
    generator = torch.Generator().manual_seed(1)
    base, source = (torch.randn(2, *layout.tokens.input_shape, generator=generator) for _ in range(2))
    available = set(vit.site_names())
    sites = [
        s for layer in range(layout.n_layers) for p in PLACES if (s := f"blocks.{layer}.{p}") in available
    ]
    runs = [
        vmi.Run(name=site, interventions=[vmi.Interchange(site=site, tokens=[1], source="source")])
        for site in sites
    ]
    data = {"base": base, "source": source}
    results = vmi.execute(vit, runs, data, progress=False)
    assert list(results.run_names) == sites
    place = len(layout.tokens.prefix) + 1
    changed = 0.0
    with torch.no_grad():
        for site, outputs in zip(sites, results.logits, strict=True):
            for example in range(2):
                one = slice(example, example + 1)
                wanted = _exchanged(vit, site, place, base[one], source[one])
                scale = float(wanted.abs().max())
                torch.testing.assert_close(outputs[one], wanted, rtol=0, atol=5e-5 * scale)
                changed = max(changed, float((vit(base[one]) - wanted).abs().max()) / scale)
    assert changed > 1e-3


def _exchanged(vit: vmi.HookedViT, site: str, place: int, base: Tensor, source: Tensor) -> Tensor:
    """The output for one image with one token exchanged, by plain hooks."""
    _, cache = vit.run(source, capture=[site])

    def exchange(value: Tensor) -> Tensor:
        index = (slice(None), slice(None), place) if site.endswith("pattern") else (slice(None), place)
        value = value.clone()
        value[index] = cache[site][index]
        return value

    with vit.hooks({site: exchange}):
        return vit(base)


def test_at_least_sixty_block_classes() -> None:
    assert len(set(block_classes().values())) >= 60


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ViTMAEModel that masks", "drops 75% of its patches at random"),
        ("CLIPModel", "it also holds a text tower; wrap its vision_model"),
        ("Dinov2Backbone", "a backbone that gives several feature maps"),
        ("VitPoseBackbone with experts", "mixtures of experts"),
    ],
)
def test_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        vmi.wrap(build_from(REFUSED[name]))


def _vit_mae() -> torch.nn.Module:
    import transformers

    return transformers.ViTMAEModel(transformers.ViTMAEConfig(**_SMALL))


def _clip() -> torch.nn.Module:
    import transformers

    config = transformers.CLIPConfig(vision_config=_SMALL, text_config={**_SMALL, "vocab_size": 20})
    return transformers.CLIPModel(config)


def _backbone() -> torch.nn.Module:
    import transformers

    return transformers.Dinov2Backbone(transformers.Dinov2Config(**_SMALL))


def _experts() -> torch.nn.Module:
    import transformers

    options = {**_SMALL, "image_size": [16, 16], "patch_size": [8, 8], "num_experts": 2, "part_features": 8}
    return transformers.VitPoseBackbone(transformers.VitPoseBackboneConfig(**options))


_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
REFUSED: dict[str, Callable[[], torch.nn.Module]] = {
    "ViTMAEModel that masks": _vit_mae,
    "CLIPModel": _clip,
    "Dinov2Backbone": _backbone,
    "VitPoseBackbone with experts": _experts,
}
