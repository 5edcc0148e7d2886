"""From a module to a wrapper: known families, one's own, other packages', and modules that are none."""

from __future__ import annotations

import logging
import re
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
from vit_mechinterp.model import Family, Port, families, registry
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
    assert (
        "The adapter wrong (other:WRONG) cannot be loaded: An adapter is a Family or a function without arguments "
        "that returns one; 'a string' gives a str."
    ) in caplog.text
    assert families()[-1] is FAMILIES[-1]


def test_a_resnet_is_refused_with_everything_that_was_probed() -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        vmi.wrap(timm.create_model("test_resnet"))
    first, *probed, nearest, last = str(raised.value).splitlines()
    assert first == "No known family of ViTs describes timm.models.resnet.ResNet. Probed:"
    # Families that probe the same places share a line.
    assert probed[0] == (
        "  timm.sam, timm.vit, timm.post_norm, timm.naflex, timm.differential, timm.parallel, "
        "timm.parallel_differential, timm.parallel_things, timm.cait, timm.xcit: no list of blocks at 'blocks'"
    )
    named = [name for line in probed for name in line.split(": ")[0].strip().split(", ")]
    # Families around those of timm are named once, by what stands around.
    assert set(named) == {family.name.partition("(")[0] for family in FAMILIES}
    assert all("no list of blocks at '" in line for line in probed)
    assert re.match(r"Nearest is [a-z_.0-9]+, 2 of whose 9 places in a block are in layer1\.0 \(BasicBlock\)", nearest)
    assert "; unknown to it: 'conv1', 'bn1', " in nearest
    assert last == (
        "If this is a ViT, describe it with @vit_mechinterp.register_adapter (docs/register_a_vit.md); if it "
        "is a model that holds one, wrap that part of it."
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


def test_the_decorator_takes_a_function_or_a_family() -> None:
    @vmi.register_adapter
    def mine() -> Family:
        return replace(OWN, name="mine")

    assert mine().name == "mine"
    assert vmi.wrap(own()).layout.family.name == "mine"
    assert vmi.register_adapter(OWN) is OWN
    with pytest.raises(SpecError, match="A family called 'mine' is registered already"):
        vmi.register_adapter(mine)
    before = vmi.wrap(own()).layout.family
    assert vmi.register_adapter(mine, replace=True) is mine
    assert before is OWN
    assert [family.name for family in families()[:2]] == ["mine", "own.vit"]
    with pytest.raises(SpecError, match=r"A family called 'timm\.vit' is registered already"):
        vmi.register(replace(OWN, name="timm.vit"), replace=True)


def test_slips_in_a_row_are_said() -> None:
    with pytest.raises(SpecError, match=r"An adapter is a Family or a function .*; dict gives a dict\."):
        vmi.register_adapter(dict)  # type: ignore[type-var]
    with pytest.raises(SpecError, match="register takes a Family, not a str"):
        vmi.register("timm.vit")  # type: ignore[arg-type]
    with pytest.raises(
        SpecError, match=r"The family 'own\.vit' names a site 'mlp_in', which no block has\. Close matches: .*mlp"
    ):
        vmi.register(replace(OWN, ports={**OWN.ports, "mlp_in": ()}))
    with pytest.raises(SpecError, match=r"blocks of the family 'own\.vit' is a tuple, even of one: \('trunk',\)"):
        vmi.register(replace(OWN, blocks="trunk"))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"ports\['ln1'\] of the family 'own\.vit' is a tuple, even of one"):
        vmi.register(replace(OWN, ports={**OWN.ports, "ln1": Port("ln1")}))  # type: ignore[dict-item]
    with pytest.raises(SpecError, match="has no port for resid_post, and every ViT has one"):
        vmi.register(replace(OWN, ports={**OWN.ports, "resid_post": ()}))
    assert OWN not in families()


def test_a_decorated_function_as_entry_point_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    @vmi.register_adapter
    def mine() -> Family:
        return replace(OWN, name="mine")

    entries = [Entry("mine", "other:mine", mine), Entry("function", "other:own", lambda: OWN)]
    monkeypatch.setattr(registry.metadata, "entry_points", lambda *, group: entries)
    monkeypatch.setattr(registry, "_BUILT_IN", [])
    assert [family.name for family in families()[:3]] == ["mine", "own.vit", FAMILIES[0].name]


class Fork(nn.Module):
    """timm's ViT with its blocks under another name, and a norm that is missing."""

    def __init__(self, without: str | None = None) -> None:
        super().__init__()
        self.trunk = plain()().blocks
        if without is not None:
            for block in self.trunk:
                delattr(block, without)


def test_the_nearest_family_is_named_with_what_is_missing() -> None:
    def nearest(module: nn.Module) -> list[str]:
        with pytest.raises(UnsupportedModelError) as raised:
            vmi.wrap(module)
        lines = str(raised.value).splitlines()
        return lines[next(n for n, line in enumerate(lines) if line.startswith("Nearest")) : -1]

    (line,) = nearest(Fork())
    assert line.startswith("Nearest is timm.vit, all of whose 9 places in a block are in trunk.0 (Block); it looks")
    assert line.endswith("it looks for the blocks at 'blocks'.")
    (line,) = nearest(Fork(without="norm1"))
    assert line.startswith("Nearest is timm.vit, 8 of whose 9 places in a block are in trunk.0 (Block); missing: 'norm1'")
    module = plain()()
    for block in module.blocks:
        block.extra = nn.Linear(2, 2)
    (line,) = nearest(module)
    assert "all of whose 9 places in a block are in blocks.0 (Block); unknown to it: 'extra'." in line
    later = plain()()
    del later.blocks[1].mlp.fc2
    (line,) = nearest(later)
    assert line.endswith("and yet: blocks.1 (Block) has no 'mlp.fc2' or 'mlp.w2' for mlp.post.")


def test_a_part_that_is_a_vit_is_named() -> None:
    module = nn.ModuleDict({"tower": nn.ModuleDict({"visual": plain()()}), "text": nn.Linear(2, 2)})
    with pytest.raises(UnsupportedModelError, match=r"Its part 'tower\.visual' is described by timm\.vit; wrap that"):
        vmi.wrap(module)
    assert vmi.wrap(module.get_submodule("tower.visual")).layout.family.name == "timm.vit"
