"""The documents' Python runs as it stands, and prints what they show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import DOCS, DOCUMENTS, code, comparable, executed
from vit_mechinterp.model import registry


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = dict(registry._REGISTERED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_outputs_are_those_shown(path: Path) -> None:
    """Renewed by ``python -m tests.documents``."""
    document = path.read_text(encoding="utf-8")
    assert comparable(executed(document)) == comparable(document)


def test_a_vit_in_forty_lines_and_its_row_in_fewer_than_fifteen() -> None:
    model, row, *_ = code((DOCS / "register_a_vit.md").read_text(encoding="utf-8"))
    lines = [len([line for line in block.splitlines() if line.strip()]) for block in (model, row)]
    assert "nn.Module" in model
    assert "vit_mechinterp" not in model
    assert lines[0] <= 40
    assert lines[1] < 15
    assert max(map(len, (model + row).splitlines())) <= 120


def test_the_document_shows_the_table_and_lies_that_were_caught() -> None:
    document = (DOCS / "register_a_vit.md").read_text(encoding="utf-8")
    assert "\n  The model conforms.\n" in document
    found = re.findall(r"  .*: blocks\.0\.(\w+): .* by (\S+) of the scale where at most \S+ is required", document)
    assert {site for site, _ in found} >= {"resid_mid", "resid_post"}
    assert all(float(number) > 1e-2 for _, number in found)


def test_links_lead_somewhere() -> None:
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert "://" in target or (path.parent / target).exists(), (path.name, target)
