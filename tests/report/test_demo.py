"""The main job, with few images: it leaves a whole page, and every analysis with its files."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from vit_mechinterp.cli import main
from vit_mechinterp.report import demo

FEW = demo.Sizes(behaviour=24, attention=8, sweep=4, das_train=8, das_test=4, das_epochs=1)


def test_a_report_prints_its_summary_and_where_the_page_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("Behaviour", "accuracy", 0.98765), ("Behaviour", "images", 8), ("Sweep", "order", "WO → WP")]
    summary = pd.DataFrame(rows, columns=["analysis", "quantity", "value"]).astype({"value": object})
    asked = {}

    def analyse(out: Path, *, progress: bool) -> demo.Report:
        asked.update(out=out, progress=progress)
        return demo.Report(out / "index.html", (), summary)

    monkeypatch.setattr(demo, "analyse", analyse)
    assert main(["demo", "--out", "somewhere", "--quiet"]) == 0
    assert asked == {"out": Path("somewhere"), "progress": False}
    assert capsys.readouterr().out.splitlines() == [
        "Behaviour",
        "  accuracy           0.988",
        "  images                 8",
        "Sweep",
        "  order            WO → WP",
        "",
        f"The page: {Path('somewhere') / 'index.html'}",
    ]


@pytest.mark.slow
def test_the_main_job_leaves_a_page_and_every_result(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    report = demo.analyse(tmp_path / "out", progress=False, sizes=FEW)
    assert torch.get_num_threads() == threads
    assert report.page == tmp_path / "out" / "index.html"
    page = report.page.read_text(encoding="utf-8")
    names = ["behaviour", "attention_stages", "attention_stages_plain", "interchange_sweep", "das"]
    assert [result.name for result in report.results] == names
    for result in report.results:
        folder = tmp_path / "out" / result.name
        files = {path.name for path in folder.iterdir()}
        assert {"table.parquet", "table.csv", "result.json", "provenance.json"} <= files
        assert {f"{name}.{kind}" for name in result.figures() for kind in ("png", "pdf")} <= files
        assert result.title in page
        assert set(result.captions) == set(result.figures())
    assert {"results.safetensors", "experiment.yaml"} <= {
        p.name for p in (tmp_path / "out" / "composed").iterdir()
    }
    assert page.count("<section") == len(names) + 2
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert list(summary.columns) == ["analysis", "quantity", "value"]
    assert set(summary["analysis"]) == {result.title for result in report.results}
    assert not re.search(r"https?://", page)
