"""Papers reproduced: a page, a folder per result, and nothing but what was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vit_mechinterp.cli import main
from vit_mechinterp.commands.reproduce import PAPERS
from vit_mechinterp.report import jelassi2022, salman2024
from vit_mechinterp.report.reproduction import reproduce

SMALL: dict[str, Any] = {
    "phases": {"examples": 200, "test_examples": 100, "steps": 30},
    "transfer": {"samples": (10, 20), "repeats": 2, "steps": 10, "test_examples": 100},
    "seeds": (0,), "steps": 20, "limit": 100,
}  # fmt: skip
MODULES: dict[str, Any] = {"jelassi2022": jelassi2022, "salman2024": salman2024}


@pytest.mark.papers
@pytest.mark.parametrize("name", list(MODULES))
def test_a_paper_leaves_a_page_with_every_figure(name: str, tmp_path: Path) -> None:
    """At the scale that the command has by default: about a minute each."""
    reproduction = MODULES[name].REPRODUCTION
    done = reproduce(reproduction, tmp_path, progress=False)
    page = done.page.read_text(encoding="utf-8")
    assert [result.name for result in done.results] == list(dict.fromkeys(section for section, _ in reproduction.figures.values()))
    for section, figure in reproduction.figures.values():
        assert (tmp_path / section / f"{figure}.png").is_file()
        assert (tmp_path / section / "table.csv").is_file()
    for result in done.results:
        assert set(result.figures()) == set(result.captions)
        assert result.title.replace("'", "&#39;") in page
    assert page.count("<img") == len(reproduction.figures)
    assert str(done).endswith(f"The page: {done.page}")


def test_one_figure_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(jelassi2022._SIZES, "tiny", SMALL)
    assert main(["reproduce", "jelassi2022", "--out", str(tmp_path), "--only", "attention_matrix", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("Phases of learning\n")
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "association_phases"}
    assert {path.name for path in (tmp_path / "association_phases").glob("*.png")} == {"attention.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jelassi"], "There is no paper 'jelassi'. Papers: jelassi2022, lepori2024, salman2024. Close matches: jelassi2022."),
        (["salman2024", "--only", "spectrum"], "There is no figure 'spectrum'. Figures: matched_pairs,"),
        (["salman2024", "--scale", "huge"], "There is no scale 'huge'. Scales: tiny, small."),
    ],
)
def test_what_there_is_is_said(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_lists_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    shown = capsys.readouterr().out
    for name, title in PAPERS.items():
        assert name in shown
        assert title in shown
