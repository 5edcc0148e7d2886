"""Every variant of every family conforms; neighbours that only look alike are refused, with the reason."""

from __future__ import annotations

import pytest
import torch

import vit_mechinterp as vmi
from tests.model.zoo import NEIGHBOURS, VARIANTS, Neighbour, Variant
from vit_mechinterp.errors import UnsupportedModelError
from vit_mechinterp.model.conformance import check


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants_conform(variant: Variant) -> None:
    vit = vmi.wrap(variant.module())
    report = check(vit)
    assert report.passed, str(report)
    layout = vit.layout
    assert (layout.tokens.prefix, layout.tokens.grid) == (variant.prefix, variant.grid)
    assert layout.output == variant.output
    assert tuple(name for name in ("ln_final", "pooled", "logits") if name in layout.absent) == variant.absent
    assert ("blocks.0.mlp.pre_linear" in vit.sites()) == variant.gated


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[-1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_variants_conform_in_other_dtypes(variant: Variant, dtype: torch.dtype) -> None:
    report = check(vmi.wrap(variant.module(dtype)))
    assert report.passed, str(report)


def test_a_model_conforms_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = check(vmi.wrap(VARIANTS[0].module()))
    assert report.passed, str(report)


def test_a_model_fresh_from_its_library_conforms() -> None:
    report = check(vmi.wrap(VARIANTS[0].build().eval()))
    assert report.passed, str(report)


@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=str)
def test_neighbours_are_refused(neighbour: Neighbour) -> None:
    module = neighbour.build()
    with pytest.raises(UnsupportedModelError) as raised:
        vmi.wrap(module)
    text = str(raised.value)
    assert neighbour.reason in text
    assert text.startswith(
        f"No known family of ViTs describes {type(module).__module__}.{type(module).__name__}."
    )
    assert text.endswith(
        "describe it with @vit_mechinterp.register_adapter (docs/register_a_vit.md); if it is a model that holds one, "
        "wrap that part of it."
    )
