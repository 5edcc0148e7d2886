"""``vit-mechinterp stimuli``: stimuli by name, saved as a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from vit_mechinterp import stimuli
from vit_mechinterp.cli import main

SMALL = ["--set", "canvas=64", "--set", "patch=8", "--set", "cell=16", "--quiet"]


def test_a_folder_holds_what_the_function_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    assert main(["stimuli", "rmts", "--n", "4", "--set", "split=val", "--out", str(out), *SMALL]) == 0
    assert f"4 examples in {out}. Columns: base, label" in capsys.readouterr().out
    saved = load_from_disk(str(out))
    made = stimuli.rmts("val", 4, canvas=64, patch=8, cell=16, progress=False)
    assert saved.features == made.features
    assert np.array_equal(np.asarray(saved[3]["base"]), np.asarray(made[3]["base"]))
    assert main(["stimuli", "rmts", "--n", "4", "--out", str(out), *SMALL]) == 2
    assert f"{out} exists already" in capsys.readouterr().err


def test_a_file_holds_photographs_with_their_masks(tmp_path: Path) -> None:
    out = tmp_path / "set" / "photographs.parquet"
    assert main(["stimuli", "realistic-discrimination", "-n", "2", "--out", str(out), "--quiet"]) == 0
    saved = Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "cache"))
    made = stimuli.realistic_discrimination(n=2)
    assert saved.features == made.features
    assert np.array_equal(np.asarray(saved[1]["mask_2"]), np.asarray(made[1]["mask_2"]))


def test_rendered_images_are_kept_beside_the_dataset(tmp_path: Path) -> None:
    pytest.importorskip("mitsuba")
    out = tmp_path / "set"
    options = [word for option in ("canvas=32", "samples=1", "seed=3") for word in ("--set", option)]
    assert main(["stimuli", "realistic_discrimination", "-n", "1", "--out", str(out), "--quiet", *options]) == 0
    assert (out / "images" / "000000.jpg").is_file()
    (row,) = load_from_disk(str(out))
    assert row["base"].size == (32, 32)
    assert row["label"] == 0


def test_what_there_is_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stimuli", "--list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == stimuli.names()
    (line,) = [line for line in listed.splitlines() if line.startswith("realistic_discrimination")]
    assert "Return photographs of two objects" in line
    assert main(["stimuli", "realistic_discrimination", "--options"]) == 0
    described = capsys.readouterr().out
    assert "samples: 'int' = 49" in described
    assert "light paths a pixel" in described


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name the stimuli: discrimination, "),
        (["rmtss", "--out", "x"], "no stimuli 'rmtss'"),
        (["rmts"], "needs --out FOLDER or --out FILE.parquet"),
        (["rmts", "--out", "x", "--set", "canvas"], "--set takes KEY=VALUE, got 'canvas'"),
        (["rmts", "--out", "x", "--set", "canvass=64"], "no option 'canvass'"),
        (["realistic_discrimination", "--out", "x.parquet", "--set", "canvas=8"], "canvas=8"),
    ],
)
def test_bad_words_are_named_and_nothing_is_written(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["stimuli", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
