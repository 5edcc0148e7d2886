"""From a module to a wrapper: known families, one's own, other packages', and modules that are none."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vit_mechinterp as vmi
from tests.model.own_vit import OWN, OwnViT
from tests.model.raw import moved, near
from tests.model.zoo import plain
from vit_mechinterp.adapters import FAMILIES
from vit_mechinterp.errors import SpecError, UnsupportedModelError
from vit_mechinterp.model import families, registry
from vit_mechinterp.model.conformance import check


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(registry, "_BUILT_IN", list(registry._BUILT_IN))


def own() -> nn.Module:
    torch.manual_seed(0)
    return OwnViT().eval()


@torch.no_grad()
def test_a_family_of_ones_own() -> None:
    module = own()
    with pytest.raises(
        UnsupportedModelError, match=r"own_vit\.OwnViT\. Probed:\n  timm\.sam, timm\.vit, .*: no list of blocks at 'blocks'\n"
    ):
        vmi.wrap(module)
    assert vmi.register(OWN) is OWN
    vit = vmi.wrap(module)
    report = check(vit)
    assert report.passed, str(report)
    assert str(vit.layout) == "own.vit: 2 blocks, 3 heads of 8, width 24, 4x4 patches of 8x8 px + 2 summary"
    x = torch.randn(2, 3, 32, 32)
    with vit.hooks({"blocks.1.attn.pattern": torch.zeros_like}):
        found = vit(x)
    moved(found, module(x))
    results = vmi.execute(
        vit,
        [vmi.Run(name="cut", interventions=[vmi.Ablate(site="blocks.1.attn.pattern", tokens=["summary"])])],
        {"base": x},
        progress=False,
    )
    with vit.hooks(
        {"blocks.1.attn.pattern": lambda value: torch.cat([value[:, :, :16], value[:, :, 16:] * 0], 2)}
    ):
        near(results.logits[0], vit(x), 1e-5)


def test_registered_families_come_first_and_have_names_of_their_own() -> None:
    built_in = families()
    mine = vmi.register(replace(OWN, name="mine"))
    yours = vmi.register(replace(OWN, name="yours"))
    assert families() == [yours, mine, *built_in]
    for taken in ("mine", "timm.vit"):
        with pytest.raises(
            SpecError, match=f"A family called '{taken}' is registered already; choose another name"
        ):
            vmi.register(replace(OWN, name=taken))


@dataclass
class Entry:
    """An entry point of another package."""

    name: str
    value: str
    family: Any

    def load(self) -> Any:
        if isinstance(self.family, Exception):
            raise self.family
        return self.family


def test_other_packages_families_are_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [
        Entry("broken", "other:BROKEN", ImportError("no module named 'other'")),
        Entry("wrong", "other:WRONG", "a string"),
        Entry("own", "other:OWN", OWN),
    ]
    asked: list[str] = []

    def entry_points(*, group: str) -> list[Entry]:
        asked.append(group)
        return entries

    monkeypatch.setattr(registry.metadata, "entry_points", entry_points)
    monkeypatch.setattr(registry, "_BUILT_IN", [])
    with caplog.at_level(logging.WARNING):
        assert vmi.wrap(own()).layout.family is OWN
        families()
    assert asked == ["vit_mechinterp.adapters"]
    assert "The adapter broken (other:BROKEN) cannot be loaded: no module named 'other'" in caplog.text
    assert "The adapter wrong (other:WRONG) is no vit_mechinterp Family." in caplog.text
    assert families()[-1] is FAMILIES[-1]


def test_a_resnet_is_refused_with_everything_that_was_probed() -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        vmi.wrap(timm.create_model("test_resnet"))
    first, *probed, last = str(raised.value).splitlines()
    assert first == "No known family of ViTs describes timm.models.resnet.ResNet. Probed:"
    # Families that probe the same places share a line.
    assert probed[0] == (
        "  timm.sam, timm.vit, timm.post_norm, timm.naflex, timm.differential, timm.parallel, "
        "timm.parallel_differential, timm.parallel_things, timm.cait, timm.xcit: no list of blocks at 'blocks'"
    )
    named = [name for line in probed for name in line.split(": ")[0].strip().split(", ")]
    assert sorted(named) == sorted(family.name for family in FAMILIES)
    assert all("no list of blocks at '" in line for line in probed)
    assert last == (
        "If this is a ViT, describe it with vit_mechinterp.register(Family(...)); if it is a model that holds "
        "one, wrap that part of it."
    )


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_what_is_no_module_or_no_longer_one_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="wrap takes a torch module, not str"):
        vmi.wrap("timm/vit")  # type: ignore[arg-type]
    module = plain()().eval()
    with pytest.raises(
        UnsupportedModelError, match=r"OptimizedModule is compiled.*wrap the module that it was made of"
    ):
        vmi.wrap(torch.compile(module))
    with pytest.raises(UnsupportedModelError, match="is compiled"):
        vmi.wrap(torch.jit.script(nn.Identity()))
    assert vmi.wrap(vmi.wrap(module)).module is module


def test_wrapping_changes_nothing() -> None:
    module = plain()().train()
    before = {name: id(value) for name, value in vars(module).items()}
    vit = vmi.wrap(module)
    assert {name: id(value) for name, value in vars(module).items()} == before
    assert module.training
    assert vit.source is None
