"""Every architecture in 16 bits: bit-identical to native in the same dtype, sweeps as plain hooks do.

In bfloat16, whose rounding is the coarsest, the fast checks are made as well. float16 is run on the CPU too: torch
2.15 has a CPU kernel in float16 for every operation of every model here, so none is left out.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vit_mechinterp as vmi
from tests.zoo.shrink import MODULES, distinct, names
from tests.zoo.test_timm import tiny
from tests.zoo.transformers_models import BUILDERS, build
from vit_mechinterp import HookedViT
from vit_mechinterp.model.conformance import check

pytestmark = pytest.mark.zoo

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@torch.no_grad()
def faults(vit: HookedViT) -> str:
    """What is wrong with a model in its dtype; nothing, if it is as it should be."""
    if vit.dtype is torch.bfloat16:
        report = check(vit, subset="fast", progress=False)
        if not report.passed:
            return str(report)
    images = torch.randn(2, *vit.layout.tokens.input_shape, generator=torch.Generator().manual_seed(1))
    if vit.layout.family.one_image:
        images = images[:1]
    images = images.to(vit.dtype)
    fused = [site for site in vit.site_names() if not site.endswith(("attn.scores", "attn.pattern"))]
    native = _native(vit, images)
    for output in (vit(images), vit.run(images, capture=fused)[0]):
        if output.dtype != native.dtype or not torch.equal(output, native):
            return "the output is not native, bit for bit"
    return _sweep(vit, images)


def _native(vit: HookedViT, images: Tensor) -> Tensor:
    """What the module itself gives out, its arguments made by the row."""
    args, kwargs = vit.layout.family.inputs(vit.module, images)
    output: Tensor = vit.layout.outcome(vit.module(*args, **kwargs))
    return output


def _sweep(vit: HookedViT, images: Tensor) -> str:
    """The stream of one image, exchanged for another's block by block, against plain hooks."""
    sites = [site for site in vit.site_names() if site.endswith("resid_post")]
    source = images.flip(-1)
    runs = [vmi.Run(name=site, interventions=[vmi.Interchange(site=site, source="source")]) for site in sites]
    results = vmi.execute(vit, runs, {"base": images, "source": source}, progress=False)
    _, values = vit.run(source, capture=sites)
    clean = vit(images).float()
    for site in sites:
        with vit.hooks({site: lambda _, site=site: values[site]}):
            wanted = vit(images).float()
        scale = float(wanted.abs().max())
        if float((results[site] - wanted).abs().max()) > 16 * torch.finfo(vit.dtype).eps * scale:
            return f"{site}: the swept output is not that of plain hooks"
        if torch.equal(wanted, clean):
            return f"{site}: an interchange changes nothing"
    return ""


@DTYPES
@pytest.mark.parametrize("module", MODULES)
def test_timm(module: str, dtype: torch.dtype) -> None:
    wrong = {}
    for name in distinct(module):
        vit = tiny(name)
        vit.module.to(dtype)
        if fault := faults(vit):
            wrong[name] = fault
    assert not wrong, "\n".join(f"{name}: {fault}" for name, fault in wrong.items())


@DTYPES
@pytest.mark.parametrize("name", BUILDERS)
def test_transformers(name: str, dtype: torch.dtype) -> None:
    assert not faults(vmi.wrap(build(name).to(dtype)))


def test_names_that_shrink_to_one_model_are_run_once() -> None:
    alike = distinct("vision_transformer_relpos")
    found = {name for first, others in alike.items() for name in (first, *others)}
    assert found == set(names("vision_transformer_relpos"))
    assert len(alike) < len(found)
