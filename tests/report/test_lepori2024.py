"""The page of Lepori et al.: its parts, its figures, its verdicts, and what it keeps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.cli import main
from vit_mechinterp.report.lepori2024 import REPRODUCTION
from vit_mechinterp.report.lepori2024.cast import CHECKPOINTS, Cast
from vit_mechinterp.report.lepori2024.claims import Claim, agreement
from vit_mechinterp.report.lepori2024.published import best, published
from vit_mechinterp.report.lepori2024.sections import SECTIONS
from vit_mechinterp.report.lepori2024.sizes import SCALES
from vit_mechinterp.report.lepori2024.verdicts import verdicts
from vit_mechinterp.report.reproduction import reproduce

SMALL = replace(
    SCALES["tiny"], accuracy=8, attention=8, realistic=4, das_train=32, das_test=8, novel=8, probe_train=32, probe_test=8,
    point_train=32, point_test=8, point_layers=1, das={"epochs": 1, "batch_size": 16}, controls=(None,), alphas=(1.0, 2.0),
)  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "tiny", SMALL)


@pytest.mark.papers
def test_the_page_has_every_section_that_the_models_allow(tmp_path: Path) -> None:
    """At the scale that the command has by default: a few minutes."""
    done = reproduce(REPRODUCTION, tmp_path, progress=False)
    made = [result.name for result in done.results]
    cast = Cast()
    for name, section in SECTIONS.items():
        has_part = section.part is None or cast.player(section.task, section.part) is not None
        possible = not section.task or (has_part and len(cast.players(section.task)) >= section.needs)
        assert (name in made) == possible, name
    assert made[-1] == "agreement"
    for section_name, figure in REPRODUCTION.figures.values():
        if section_name in made:
            assert (tmp_path / section_name / f"{figure}.png").is_file(), (section_name, figure)
    page = done.page.read_text(encoding="utf-8")
    said = " ".join(done.results[-1].description.split())
    assert "Not shown at this scale: " in said
    assert "fig15" not in said
    assert "attention_rmts_dinov2" in said
    assert "tiny ViT, disentanglement loss" in page


@pytest.mark.usefixtures("small")
def test_finished_sections_are_kept_and_others_are_not(tmp_path: Path) -> None:
    only = ["fig2_scratch"]
    first = reproduce(REPRODUCTION, tmp_path, only=only, progress=False)
    folder = tmp_path / "attention_discrimination_scratch"
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", folder.name, "agreement"}
    table = pd.read_parquet(folder / "table.parquet")
    table["WP"] = 0.25  # a mark: a result that is kept is read, not made again
    table.to_parquet(folder / "table.parquet", index=False)
    again = reproduce(REPRODUCTION, tmp_path, only=only, progress=False)
    assert (again.results[0].table["WP"] == 0.25).all()
    assert not (first.results[0].table["WP"] == 0.25).all()
    assert list(again.results[0].pictures) == ["stages"]
    asked = json.loads((folder / "asked.json").read_text())
    asked["models"] = ["another"]
    (folder / "asked.json").write_text(json.dumps(asked))
    anew = reproduce(REPRODUCTION, tmp_path, only=only, progress=False)
    pd.testing.assert_frame_equal(anew.results[0].table, first.results[0].table)


def test_a_group_stands_for_its_figures() -> None:
    assert REPRODUCTION.places(["fig3"]) == [("das_discrimination", "das_by_layer"), ("das_rmts", "das_by_layer")]
    assert {section for section, _ in REPRODUCTION.figures.values()} <= set(SECTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fig99"], "There is no figure 'fig99'. Figures: fig1, fig7,"),
        (["--scale", "large"], "There is no scale 'large'. Scales: tiny, small, paper."),
        (["--only", "fig15_rmts"], "holds no dinov2 model trained on relational match to sample. Train one"),
        (["--model", "nowhere"], "nowhere holds no finished training."),
    ],
)
def test_what_cannot_be_made_is_said_first(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "lepori2024", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parts_go_to_the_models_that_fit(tmp_path: Path) -> None:
    for name, accuracy, changes in [
        ("a", 0.9, {"auxiliary_weight": 0.0}),
        ("b", 0.7, {"auxiliary_weight": 0.0, "seed": 1}),
        ("c", 0.8, {"auxiliary_weight": 1.0}),
        ("d", 0.55, {"task": "rmts", "auxiliary_weight": 1.0}),
    ]:
        _training(tmp_path / name, accuracy, changes)
    cast = Cast(tmp_path)
    assert _folder(cast.player("discrimination")) == "a"
    assert _folder(cast.player("discrimination", "scratch")) == "a"
    assert cast.player("discrimination", "dinov2") is None
    assert [_folder(player) for player in cast.players("discrimination")] == ["a", "c"]
    rmts = cast.player("rmts")
    assert rmts is not None
    assert not rmts.learned
    assert rmts.words == "tiny ViT, disentanglement loss"
    _training(tmp_path / "e", 0.6, {"preset": "clip-b16", "model": "hf/openai/clip-vit-base-patch16"})
    assert _folder(Cast(tmp_path).player("discrimination")) == "e"


def _folder(player: Any) -> str:
    assert player is not None
    return str(player.training.folder.name)


def _training(folder: Path, accuracy: float, changes: dict[str, Any]) -> None:
    shutil.copytree(CHECKPOINTS / "discrimination-plain", folder)
    path = folder / "training.json"
    document = json.loads(path.read_text())
    document["config"] |= changes
    document["test"] = {"test_iid": {"accuracy": accuracy}}
    path.write_text(json.dumps(document))


def test_published_numbers_are_those_of_the_logs() -> None:
    assert best(item="fig3", task="discrimination", kind="shape", quantity="interchange accuracy") == (0.936, "2")
    assert best(item="fig5", model="CLIP B/16", combinations=256, quantity="intervention success, alpha 1") == (0.983, "5")
    scratch = published(item="accuracy", model="scratch B/16", task="discrimination", combinations=256, kind="test_iid")
    assert scratch["value"].tolist() == [0.805]
    with pytest.raises(LookupError, match="No published number"):
        best(item="fig3", task="counting")


def test_verdicts_follow_the_numbers() -> None:
    def searched(by_layer: list[float], wrong: float) -> CircuitResult:
        rows = [("shape", "none", layer, value) for layer, value in enumerate(by_layer)]
        rows += [("shape", "wrong_object", layer, wrong) for layer in range(len(by_layer))]
        table = pd.DataFrame(rows, columns=["attribute", "control", "layer", "accuracy"])
        return CircuitResult(name="das_discrimination", table=table)

    good, bad = (
        verdicts({"das_discrimination": searched(*case)})
        for case in [([0.6, 0.9, 0.1], 0.5), ([0.6, 0.7, 0.9], 0.8)]
    )
    assert [claim.holds for claim in good] == [True, True]
    assert [claim.holds for claim in bad] == [False, False]
    assert good[0].here == "0.900 in layer 1; 0.100 in layer 2, the last"
    assert good[0].published == "0.936 in layer 2 (logged for CLIP B/16); 0.007 in the last"


@pytest.mark.parametrize(("local", "holds"), [(0, True), (2, True), (3, False), (7, False)])
def test_hardly_any_head_is_one_in_ten(local: int, holds: bool) -> None:
    name = "attention_discrimination_scratch"
    table = pd.DataFrame({"WO_direct": [0.9] * local + [0.1] * (24 - local)})
    (claim,) = verdicts({name: CircuitResult(name=name, table=table)})
    assert claim.holds is holds
    assert claim.here.startswith(f"{local} of 24 heads")


def test_what_does_not_agree_is_said_in_words() -> None:
    claims = [
        Claim("Fig. 3", "one", "0.9", "0.8 here", "above 0.7", True),
        Claim("Fig. 4", "two", "", "0.1 here", "above 0.7", False),
        Claim("Fig. 6", "three", "", "r = 0.1", "above 0", None),
    ]
    found = agreement(claims, "tiny", {"das_rmts": "no model"})
    assert found.summary == {"agrees": 1, "does not agree": 1, "cannot be told": 1}
    assert "What does not agree: Fig. 4: 0.1 here." in found.description
    assert "Not shown at this scale: das_rmts (no model)." in found.description
    assert found.table["verdict"].tolist() == ["agrees", "does not agree", "cannot be told"]
