"""docs/coming_from.md: ten lines of every package, and ours beside them, which run."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.documents import code

PAGE = (Path(__file__).parent.parent.parent / "docs" / "coming_from.md").read_text(encoding="utf-8")
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:]}


def lines(section: str) -> list[str]:
    """The right column of a section's table."""
    rows = re.findall(r"^\| (.+) \| `(.+)` \|$", SECTIONS[section], flags=re.MULTILINE)
    return [ours for _, ours in rows]


@pytest.mark.parametrize("section", ["TransformerLens", "nnsight", "pyvene"])
def test_our_lines_run(section: str) -> None:
    ours = lines(section)
    assert len(ours) == 10
    names: dict[str, Any] = {}
    setup = code(PAGE)[0]
    exec(compile(setup, "setup", "exec"), names)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for line in ours:
            exec(compile(line, line, "exec"), names)
    vit, images = names["vit"], names["images"]
    clean = vit(images)
    if section == "TransformerLens":
        assert names["sweep"].logits.shape == (3, 4, 5)
        assert names["parts"].shape == (7, 4, 17)
        changed = [names["edited"], names["subspace"].logits[0], names["sweep"].logits[2]]
    elif section == "nnsight":
        assert "timm.vit" in printed.getvalue()
        assert names["g"].shape == (4, 17, 24)
        assert float(names["g"].abs().max()) > 0
        changed = [names["edited"], names["swapped"].logits[0], names["requested"].logits[0]]
    else:
        assert names["run"].interventions == (names["swap"],)
        torch.testing.assert_close(names["tensors"]["basis"], names["basis"])
        changed = [names["swapped"].logits[0], names["both"].logits[0]]
    assert all(float((output - clean).detach().abs().max()) > 1e-4 for output in changed)


def test_the_trace_runs_from_a_file(tmp_path: Path) -> None:
    """nnsight reads the body of a trace as source."""
    setup, trace = code(PAGE)
    vit = "vit = vmi.wrap(module)"
    check = "assert torch.equal(h, vit.run(images, capture=['blocks.1.resid_post'])[1]['blocks.1.resid_post'])"
    script = tmp_path / "script.py"
    script.write_text("\n".join([setup, vit, trace, check]), encoding="utf-8")
    runpy.run_path(str(script))
