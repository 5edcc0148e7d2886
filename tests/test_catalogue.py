"""The catalogue as a value: selecting, suggesting, reading back, and putting reasons together."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_mechinterp.catalogue import Catalogue, Entry, Row, catalogue, read, summarised
from vit_mechinterp.errors import SpecError

SMALL = Catalogue(
    {"timm": "1.0"},
    (Row("timm.vit", "yes", "yes"),),
    (
        Entry("timm", "vit_tiny", "timm.vit", "VisionTransformer", "Block", "12 blocks", {"logits": "no head"}),
        Entry("hf", "Dinov2Model", "transformers.dinov2", "Dinov2Model", "Layer", checkpoint="facebook/dinov2-base"),
    ),
)


def test_written_and_read_back_it_is_the_same(tmp_path: Path) -> None:
    SMALL.write(tmp_path / "c.json")
    again = read(tmp_path / "c.json")
    assert again == SMALL
    assert len((tmp_path / "c.json").read_text().splitlines()) == 10


def test_selecting() -> None:
    assert [entry.name for entry in SMALL.select("timm")] == ["vit_tiny"]
    assert [entry.name for entry in SMALL.select(search="DINOV2-B")] == ["Dinov2Model"]
    assert SMALL.select("hf", "vit_tiny") == []
    with pytest.raises(SpecError, match=r"The catalogue has no library 'hff'\. Close matches: hf\. It has: timm, hf\."):
        SMALL.select("hff")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timm/vit_tinny", " Close matches: 'timm/vit_tiny'."),
        ("vit-tiny", " Close matches: 'timm/vit_tiny'."),
        ("facebook/dinov2-bse", " Close matches: 'hf/facebook/dinov2-base'."),
        ("dinov2", " Close matches: 'hf/facebook/dinov2-base'."),
        ("resnet50", ""),
        ("", ""),
    ],
)
def test_near(name: str, text: str) -> None:
    assert SMALL.near(name) == text


def test_reasons_are_put_together_by_site() -> None:
    windows = {f"blocks.{layer}.attn.q": "in windows" for layer in (0, 1, 3, 5)}
    absent = {"logits": "no head", **windows, **{f"blocks.{layer}.ln2": "none" for layer in range(6)}}
    absent["blocks.4.attn.q"] = "another reason"
    assert summarised(absent, 6) == {
        "logits": "no head",
        "attn.q": "blocks 0-1, 3, 5: in windows; block 4: another reason",
        "ln2": "none",
    }


def test_the_shipped_one_is_whole() -> None:
    known = catalogue()
    assert set(known.libraries) == set(known.versions) - {"torch"}
    assert {entry.row for entry in known.entries} == {row.name for row in known.rows}
    assert known.row("timm.vit").growth == "yes"
