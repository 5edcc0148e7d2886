"""The page of Lepori et al.: its parts, its figures, its verdicts, and what it keeps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from vit_mechinterp.cli import main
from vit_mechinterp.errors import SpecError
from vit_mechinterp.report.lepori2024 import REPRODUCTION
from vit_mechinterp.report.lepori2024.cast import CHECKPOINTS, HELD_OUT, TASK_NAMES, TASKS, Cast
from vit_mechinterp.report.lepori2024.sections import SECTIONS
from vit_mechinterp.report.lepori2024.sizes import SCALES
from vit_mechinterp.report.reproduction import reproduce
from vit_mechinterp.training import preset, train
from vit_mechinterp.training.config import EVALUATION_SPLITS

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
        possible = possible and (section.records is None or name in ("accuracy_discrimination", "accuracy_rmts"))
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
    for task in TASKS:
        subject = cast.player(task)
        assert subject is not None
        assert f"Attention stages, {TASK_NAMES[task]}: {subject.words}" in page


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
    scaled = [("probe_rmts_dino", name) for name in ("alphas", "alpha_0.5", "alpha_1", "alpha_2")]
    assert REPRODUCTION.places(["fig37"]) == scaled
    assert SCALES["paper"].alphas == (0.5, 1.0, 2.0)
    assert {section for section, _ in REPRODUCTION.figures.values()} <= set(SECTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fig99"], "There is no figure 'fig99'. Figures: fig1, fig7,"),
        (["--scale", "large"], "There is no scale 'large'. Scales: tiny, small, paper."),
        (["--only", "fig15_rmts"], "holds no dinov2 model trained on relational match to sample. Train one"),
        (["--only", "fig2", "--only", "fig2_dino"], "holds no dino model trained on relational match to sample. Train one"),
        (["--only", "fig2", "--only", "fig37"], "holds no dino model trained on relational match to sample. Train one"),
        (["--model", "nowhere"], "nowhere holds no finished training."),
        (["--data", "cifar10"], "data='cifar10': this paper is about its own stimuli, so no other images take their place"),
    ],
)
def test_what_cannot_be_made_is_said_first(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "lepori2024", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small")
def test_of_a_group_what_no_model_plays_is_left_out_and_named(tmp_path: Path) -> None:
    _training(tmp_path / "models" / "a", 0.9, {"auxiliary_weight": 0.0})
    how: dict[str, Any] = {"model": str(tmp_path / "models"), "progress": False}
    done = reproduce(REPRODUCTION, tmp_path / "out", only=["fig2"], **how)
    made = [result.name for result in done.results]
    assert made == ["attention_discrimination", "attention_discrimination_scratch", "agreement"]
    assert "attention_rmts_dino (" in done.results[-1].description
    assert "fig3" not in done.results[-1].description
    assert done.page.is_file()


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
    assert [_folder(player) for player in cast.players("discrimination")] == ["a", "c", "b"]
    assert [_folder(player) for player in cast.players("discrimination", at_most=2)] == ["a", "c"]
    assert [player.part for player in cast.players("discrimination")] == [
        "no auxiliary loss, seed 0", "disentanglement loss", "no auxiliary loss, seed 1",
    ]  # fmt: skip
    assert [player.part for player in cast.players("discrimination", at_most=2)] == ["no auxiliary loss", "disentanglement loss"]
    rmts = cast.player("rmts")
    assert rmts is not None
    assert not rmts.learned
    assert rmts.words == "tiny ViT, disentanglement loss"
    _training(tmp_path / "e", 0.6, {"preset": "clip-b16", "model": "hf/openai/clip-vit-base-patch16"})
    assert _folder(Cast(tmp_path).player("discrimination")) == "e"


def test_models_that_held_objects_out_go_before_others_where_there_are_three(tmp_path: Path) -> None:
    for name, changes in {
        "all": {"auxiliary_weight": 0.0},
        "a": {"combinations": "32-32-224"},
        "b": {"combinations": "32-32-224", "seed": 1},
    }.items():
        _training(tmp_path / name, 0.9, changes)
    cast = Cast(tmp_path)
    assert len(cast.players("discrimination")) == 3
    assert _folder(cast.player("discrimination")) == "all"
    assert _folder(cast.player("discrimination", HELD_OUT)) == "a"
    shutil.rmtree(tmp_path / "all")
    alone = Cast(tmp_path)
    assert _folder(alone.player("discrimination")) == "a"
    assert alone.player("discrimination", HELD_OUT) is None
    _training(tmp_path / "c", 0.9, {"combinations": "32-32-224", "auxiliary_weight": 1.0})
    _training(tmp_path / "all-again", 0.9, {"auxiliary_weight": 0.0})
    assert sorted(_folder(player) for player in Cast(tmp_path).players("discrimination")) == ["a", "b", "c"]


@pytest.mark.usefixtures("small")
def test_a_model_that_held_objects_out_is_searched_on_these_too(tmp_path: Path) -> None:
    _training(tmp_path / "models" / "all", 0.9, {"auxiliary_weight": 0.0})
    _training(tmp_path / "models" / "some", 0.9, {"combinations": "32-32-224"})
    how: dict[str, Any] = {"model": str(tmp_path / "models"), "progress": False}
    found, agreed = reproduce(REPRODUCTION, tmp_path / "out", only=["das_held_out_discrimination"], **how).results
    assert set(found.table["split"]) == {"test_iid", "test"}
    assert list(found.pictures) == ["das_splits"]
    assert agreed.table["its number"].tolist() == ["0.885 (logged for CLIP B/16)", "0.889 (logged for CLIP B/16)"]
    with pytest.raises(SpecError, match=r"holds no model that held objects out of its training .*relational match to sample"):
        reproduce(REPRODUCTION, tmp_path / "none", only=["das_held_out_rmts"], **how)


@pytest.mark.usefixtures("small")
def test_more_models_fill_the_table_the_points_and_the_verdicts(tmp_path: Path) -> None:
    """As when further checkpoints are shipped: other losses, further seeds."""
    pipeline = [{"attention": "within_pair", "layers": [2]}]
    for name, accuracy, changes in [
        ("plain", 0.7, {"auxiliary_weight": 0.0}),
        ("plain-1", 0.72, {"auxiliary_weight": 0.0, "seed": 1, "precision": "bf16"}),
        ("pipeline", 0.9, {"auxiliary_weight": 0.0, "pipeline": pipeline}),
        ("both", 0.95, {"auxiliary_weight": 1.0, "pipeline": pipeline}),
        ("both-longer", 0.96, {"auxiliary_weight": 1.0, "pipeline": pipeline, "steps": 9000}),
    ]:
        _training(tmp_path / "models" / name, accuracy, changes)
    only = ["table1_discrimination", "fig6_discrimination"]
    done = reproduce(REPRODUCTION, tmp_path / "out", only=only, model=str(tmp_path / "models"), progress=False)
    table, points, agreed = (result.table for result in done.results)
    whole = table[(table["seed"] == "all") & (table["split"] == "test_iid")].set_index("condition")
    assert list(whole.index) == [
        "both losses, steps 4500", "both losses, steps 9000", "pipeline loss", "no auxiliary loss",
    ]  # fmt: skip
    assert whole["interval"]["no auxiliary loss"] == "t over 2 seeds"
    assert whole["n_seeds"].tolist() == [1, 1, 1, 2]
    assert set(points["model"]) == {
        "both losses, steps 4500", "both losses, steps 9000", "pipeline loss", "no auxiliary loss",
    }  # fmt: skip
    assert "4 of 5 models are points: of every kind" in done.results[1].captions["disentanglement_generalization"]
    claims = agreed.set_index("the paper")["here"]
    assert claims["the pipeline loss helps a model that is trained from scratch"] == (
        "0.710 (mean of 2 seeds) without, 0.900 with"
    )
    assert claims["both losses together help a model that is trained from scratch"].endswith("0.960 with")
    assert (agreed["figure"] == "Fig. 6").sum() == 3


@pytest.mark.usefixtures("small")
def test_every_table_has_its_models_and_the_logged_accuracies_beside_them(tmp_path: Path) -> None:
    clip, dino, clip32 = "hf/openai/clip-vit-base-patch16", "hf/facebook/dino-vitb16", "hf/openai/clip-vit-base-patch32"
    none = {"auxiliary_weight": 0.0}
    for name, accuracy, changes in [
        ("clip", 0.97, {"preset": "clip-b16", "model": clip, **none}),
        ("dino", 0.8, {"preset": "dino-b16", "model": dino, "combinations": "32-32-224", **none}),
        ("clip-32", 0.95, {"preset": "clip-b32", "model": clip32, "patch": 32, "task": "rmts", **none}),
        ("scratch", 0.8, {"preset": "scratch-b16", "model": "timm/vit_base_patch16_224", "pretrained": False, **none}),
        ("scratch-loss", 0.9, {"preset": "scratch-b16", "model": "timm/vit_base_patch16_224", "pretrained": False,
                               "auxiliary_weight": 1.0}),
    ]:
        _training(tmp_path / "models" / name, accuracy, changes)
    only = ["table1_discrimination", "table2", "table3", "table6"]
    how: dict[str, Any] = {"model": str(tmp_path / "models"), "progress": False}
    first, second, third, sixth, agreed = reproduce(REPRODUCTION, tmp_path / "out", only=only, **how).results
    rows = [list(dict.fromkeys(result.table["condition"])) for result in (first, second, third, sixth)]
    assert rows == [
        ["no auxiliary loss", "disentanglement loss"], ["CLIP ViT-B/16", "from scratch, ViT-B/16"], ["no auxiliary loss"],
        ["no auxiliary loss"],
    ]  # fmt: skip
    assert dict(zip(second.table["condition"], second.table["pretraining"], strict=True)) == {
        "CLIP ViT-B/16": "400M image-text pairs", "from scratch, ViT-B/16": "none",
    }  # fmt: skip
    assert set(second.table["split"]) >= {"train", "test", "realistic"}
    assert "realistic" not in set(sixth.table["split"])
    claims = agreed.table.set_index("the paper")
    assert claims.loc["CLIP ViT-B/16 is right on new images about as often as there"].tolist() == [
        "Table 2", "IID 0.993, compositional 0.993, OOD shape & colour 0.980 (logged)",
        "IID 0.970, compositional 0.970, OOD shape & colour 0.970",
        "IID and compositional accuracy differ by no more than 0.05", "agrees",
    ]  # fmt: skip
    dino_row = claims.loc["DINO ViT-B/16, no auxiliary loss is right on new images about as often as there"]
    assert (dino_row["figure"], dino_row["its number"][:9], dino_row["verdict"]) == ("Table 3", "IID 0.923", "does not agree")
    assert claims.loc["CLIP ViT-B/32, no auxiliary loss is right on new images about as often as there"]["figure"] == "Table 6"
    loss = claims.loc["the disentanglement loss helps a model that is trained from scratch"]
    assert (loss["here"], loss["verdict"]) == ("0.800 without, 0.900 with", "agrees")
    with pytest.raises(SpecError, match="no pretrained model with patches of 14 or 16 px trained on 256 combinations of rel"):
        reproduce(REPRODUCTION, tmp_path / "none", only=["table_rmts_256"], **how)


@pytest.mark.papers
def test_the_scale_of_the_paper_runs_on_a_model_of_its_geometry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small DINOv2 in the place of the hub's: patches of 14 px on a canvas of 224, two blocks."""
    assert SCALES["paper"].controls == (None, "wrong_object", "random_patch", "random_weights")
    sizes = replace(SMALL, controls=SCALES["paper"].controls, das_train=16, das_test=8, point_models=None)
    monkeypatch.setitem(SCALES, "paper", sizes)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(image_size=518, patch_size=14, **shape)).save_pretrained(tmp_path / "hub")
    brief = {"steps": 1, "batch_size": 2, "train_images": 4, "validation_images": 2, "test_images": 4, "device": "cpu"}
    config = preset("dinov2-b14", model=f"hf/{tmp_path}/hub", task="rmts", **brief)
    train(config, tmp_path / "models" / "dinov2", progress=False)
    how: dict[str, Any] = {"scale": "paper", "model": str(tmp_path / "models"), "progress": False}
    stages, search, agreed = reproduce(REPRODUCTION, tmp_path / "out", only=["fig15_rmts", "fig16_rmts"], **how).results
    assert stages.title == "Attention stages, relational match to sample: DINOv2 ViT-B/14"
    assert stages.provenance["first_peak_layer"] == 1
    assert {"BP", "within_pair", "perceptual", "relational"} <= set(stages.table.columns)
    assert set(search.table["control"]) == {"none", "wrong_object", "random_patch", "random_weights"}
    assert search.table["layer"].unique().tolist() == [0, 1]
    assert "It has hardly learned the task" in search.description
    assert agreed.table["its number"].tolist() == ["0.878 (logged)", "0.914 (logged)"]
    with pytest.raises(SpecError, match="holds no dino model trained on relational match to sample"):
        reproduce(REPRODUCTION, tmp_path / "none", only=["fig31"], **how)


def test_the_points_are_as_many_as_the_scale_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "tiny", replace(SMALL, point_models=3))
    for seed in range(4):
        _training(tmp_path / "models" / f"seed-{seed}", 0.7 + seed / 50, {"seed": seed})
    how: dict[str, Any] = {"model": str(tmp_path / "models"), "progress": False}
    found = reproduce(REPRODUCTION, tmp_path / "out", only=["fig6_discrimination"], **how).results[0]
    assert list(dict.fromkeys(found.table["model"])) == [f"no auxiliary loss, seed {n}" for n in (3, 0, 1)]
    assert "3 of 4 models are points: " in found.description
    search = reproduce(REPRODUCTION, tmp_path / "again", only=["fig3_discrimination"], **how).results[0]
    (tmp_path / "again" / "attention_discrimination").rename(tmp_path / "gone")
    shared = reproduce(REPRODUCTION, tmp_path / "again", only=["fig6_discrimination"], **how).results[0]
    own = search.table[(search.table["layer"] == 0) & (search.table["split"] == "test_iid")].set_index("attribute")["accuracy"]
    assert shared.table.iloc[0][["shape", "color"]].tolist() == own[["shape", "color"]].tolist()


def _folder(player: Any) -> str:
    assert player is not None
    return str(player.training.folder.name)


def _training(folder: Path, accuracy: float, changes: dict[str, Any]) -> None:
    """A finished training with weights of its own."""
    shutil.copytree(CHECKPOINTS / "discrimination-plain", folder)
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"] += sum(map(ord, folder.name)) * 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "training.json"
    document = json.loads(path.read_text())
    document["config"] |= changes
    document["test"] = {split: {"accuracy": accuracy} for split in EVALUATION_SPLITS}
    path.write_text(json.dumps(document))
