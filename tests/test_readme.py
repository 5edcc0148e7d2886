"""The README's Python runs as it stands, offline, and says what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = blocks()
    assert len([line for line in source.splitlines() if line.strip()]) <= 15
    exec(compile(source, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "forwards' worth of blocks" in printed
    assert "blocks.5.attn.pattern" in printed
    flipped = [float(rate) for rate in re.findall(r"^layer \d\s+([01]\.\d+)", printed, flags=re.MULTILINE)]
    assert len(flipped) == 6
    assert flipped[0] > flipped[-1], "patch tokens behind the last block reach no CLS readout"


def test_first_line_is_one_sentence_and_links_lead_somewhere() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (root / target).exists(), target
