"""Behaviour on every split, over seeds: against counts made by hand, and from the records of trainings."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import vit_mechinterp as vmi
from vit_mechinterp.circuits.accuracy_intervals import over_images, over_seeds, verdict
from vit_mechinterp.circuits.generalization import accuracy_by_split, generalization
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.stimuli import DiscriminationGenerator, discrimination
from vit_mechinterp.training import Training, TrainingConfig, by_condition, train, trainings

module: Any = importlib.import_module("vit_mechinterp.circuits.generalization")  # the name is the function
IMAGES: dict[str, Any] = {"canvas": 128, "patch": 16, "cell": 32}
N = 24


def brief(**changes: Any) -> TrainingConfig:
    """One step from a model that answers rightly often, so that accuracies differ."""
    settings: dict[str, Any] = {
        "initial": "vmi/discrimination-plain",
        "steps": 1,
        "batch_size": 2,
        "learning_rate": 1e-9,
        "validation_images": 2,
        "test_images": N,
        "device": "cpu",
    }
    return TrainingConfig(**settings | changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train(brief(seed=seed), folder / f"disentangled-{seed}", progress=False)
    train(brief(auxiliary_weight=0.0, combinations="32-32-224"), folder / "plain", progress=False)
    return folder


def test_records_are_grouped_by_what_differs(runs: Path) -> None:
    records = trainings(runs)
    assert [record.folder.name for record in records] == ["disentangled-0", "disentangled-1", "plain"]
    groups = by_condition(records)
    assert {condition: list(seeds) for condition, seeds in groups.items()} == {
        "disentanglement loss, 256-256-256": [0, 1],
        "no auxiliary loss, 32-32-224": [0],
    }
    assert list(by_condition(records[:2])) == ["disentanglement loss"]
    with pytest.raises(DataError, match="are both 'no auxiliary loss' with seed 0, and all their settings are the same"):
        by_condition([records[2], Training(**{**vars(records[2]), "folder": Path("elsewhere")})])


def test_other_settings_tell_trainings_apart_where_the_losses_do_not(runs: Path) -> None:
    record = trainings(runs)[2]

    def other(folder: str, **changes: Any) -> Training:
        config = record.config.model_copy(update=changes)
        return Training(**{**vars(record), "folder": Path(folder), "config": config})

    longer, wider = other("longer", steps=9000), other("wider", steps=9000, learning_rate=1e-3)
    assert list(by_condition([record, longer])) == ["no auxiliary loss, steps 1", "no auxiliary loss, steps 9000"]
    assert list(by_condition([longer, wider])) == [
        "no auxiliary loss, learning_rate 1e-09", "no auxiliary loss, learning_rate 0.001",
    ]  # fmt: skip
    # Where a training ran, and what a loss that is off would have read, is no difference.
    elsewhere = other("elsewhere", seed=1, threads=3, precision="bf16", auxiliary_site="blocks.4.resid_post")
    assert by_condition([record, elsewhere]) == {"no auxiliary loss": {0: record, 1: elsewhere}}
    starts = [other(f"start-{n}", seed=n, initial=f"runs/first{f'-{n}' if n else ''}") for n in (0, 1, 2)]
    assert list(by_condition(starts)) == ["no auxiliary loss"]
    assert list(by_condition([starts[0], other("b", seed=1, initial="runs/second-1")])) == [
        "no auxiliary loss, initial runs/first", "no auxiliary loss, initial runs/second-1",
    ]  # fmt: skip
    assert starts[1].pretraining == "starts from runs/first-1"
    assert starts[1].model == "ViT, 6 blocks of width 128"
    assert other("new", initial=None).model == "ViT, 6 blocks of width 128, from scratch"


def test_every_number_is_a_count_on_that_split(runs: Path) -> None:
    result = generalization(by_condition(trainings(runs)), n=N, progress=False)
    table = result.table
    assert set(table["split"]) == {
        "train", "val", "test_iid", "test", "ood-shape", "ood-color", "ood-shape-color"
    }  # fmt: skip
    for (folder, seed, combinations), condition in {
        ("disentangled-1", 1, "256-256-256"): "disentanglement loss, 256-256-256",
        ("plain", 0, "32-32-224"): "no auxiliary loss, 32-32-224",
    }.items():
        module = vmi.load(f"timm/{runs / folder}").module
        own = table[(table["condition"] == condition) & (table["seed"] == str(seed))].set_index("split")
        for split, (stream, objects) in {
            "train": ("train", combinations),
            "test": ("test", combinations),
            "ood-shape": ("test", "ood-shape"),
        }.items():
            batch = DiscriminationGenerator(stream, seed=seed, combinations=objects, **IMAGES).batch(0, N)
            with torch.no_grad():
                right = (module(batch.images()).argmax(-1) == batch.labels()).double().mean()
            assert own.loc[split, "accuracy"] == pytest.approx(float(right), abs=1e-12)
    assert table["accuracy"].nunique() > 3


def test_intervals_are_over_seeds_where_there_are_several(runs: Path) -> None:
    records = trainings(runs)
    for record, accuracy in zip(records, (0.75, 0.875, 0.5), strict=True):
        vars(record)["test"] = {"test": {"accuracy": accuracy}}
    table = generalization(by_condition(records), n=N, splits=["test"], progress=False).table
    several = table[(table["condition"] == "disentanglement loss, 256-256-256")].set_index("seed")
    values = several.loc[["0", "1"], "accuracy"].to_numpy(dtype=float)
    assert list(values) == [0.75, 0.875]
    half = 12.7062 * abs(values[0] - values[1]) / 2  # t of one degree of freedom; sd / sqrt(2) of two values
    row = several.loc["all"]
    assert row["interval"] == "t over 2 seeds"
    assert row["accuracy"] == pytest.approx(values.mean())
    assert row["accuracy_low"] == pytest.approx(max(values.mean() - half, 0), abs=1e-4)
    single = table[table["condition"] == "no auxiliary loss, 32-32-224"].set_index("seed").loc["all"]
    assert single["interval"] == f"bootstrap over {N} images"
    assert single["accuracy_low"] < single["accuracy"] < single["accuracy_high"]
    assert (single["n_seeds"], row["n_seeds"], row["n_images"]) == (1, 2, 2 * N)


def test_recorded_accuracies_are_taken_and_equal_measured_ones(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = by_condition(trainings(runs))
    measured = generalization(records, n=N, splits=["test"], recorded=False, progress=False).table
    monkeypatch.setattr(Training, "load", lambda self: pytest.fail("a model was loaded"))
    recorded = generalization(records, n=N, splits=["test"], progress=False)
    assert recorded.table.equals(measured)
    assert set(recorded.provenance["models"].values()) == {"recorded by the training"}


def test_models_and_datasets_of_ones_own(runs: Path, tmp_path: Path) -> None:
    models = [vmi.load(f"timm/{runs}/disentangled-{seed}") for seed in (0, 1)]
    data = discrimination("val", 10, seed=9, progress=False, **IMAGES)
    result = generalization(
        {"ours": models, "alone": models[0]}, n=N, splits=["test"], realistic=data,
        pretraining={"ours": "12 images"}, progress=False,
    )  # fmt: skip
    own = result.table[result.table["condition"] == "ours"]
    assert set(own["pretraining"]) == {"12 images"}
    batch = DiscriminationGenerator("val", seed=9, **IMAGES).batch(0, 10)
    with torch.no_grad():
        right = (models[1](batch.images()).argmax(-1) == batch.labels()).double().mean()
    found = own[(own["split"] == "realistic") & (own["seed"] == "1")]["accuracy"].item()
    assert found == pytest.approx(float(right))
    text = accuracy_by_split(result)
    assert list(text.columns) == ["condition", "pretraining", "test", "realistic"]
    folder = result.save(tmp_path)
    assert {"table.png", "accuracy.pdf"} <= {file.name for file in folder.iterdir()}


def test_chance_is_named() -> None:
    assert verdict((0.45, 0.55), [(0.45, 0.55)]) == "at chance"
    assert verdict((0.6, 0.7), [(0.6, 0.7)]) == "above"
    assert verdict((0.2, 0.4), [(0.2, 0.4)]) == "below"
    assert verdict(over_seeds(np.array([0.85, 0.95])), [(0.8, 0.9), (0.9, 0.98)]) == "undecided"
    assert over_seeds(np.array([0.9, 0.9, 0.9])) == (pytest.approx(0.9), pytest.approx(0.9))
    low, high = over_images(0.8, 400)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.8 * 0.2 / 400), rel=0.15)


def test_a_model_at_chance_is_reported_so(runs: Path) -> None:
    record = trainings(runs)[2]
    guess = {"test": {"accuracy": 0.52}, "test_iid": {"accuracy": 0.9}}
    guessing = Training(record.folder, record.config, 1, {}, guess)
    result = generalization({"guessing": guessing}, n=N, splits=["test", "test_iid"], progress=False)
    assert "At chance: guessing (compositional)." in result.description
    line = accuracy_by_split(result).iloc[0]
    assert line["compositional"].startswith("0.520 [")
    assert line["compositional"].endswith("] at chance")
    assert line["IID"].endswith("]")


def test_bad_input_is_named_before_any_work(runs: Path) -> None:
    vit = vmi.load(f"timm/{runs}/plain")
    with pytest.raises(SpecError, match=r"no split 'ood_shape'\. Close matches: ood-shape"):
        generalization({"a": vit}, splits=["ood_shape"], progress=False)  # type: ignore[list-item]
    with pytest.raises(SpecError, match=r"generalization: task: .*'discrimination' or 'rmts'"):
        generalization({"a": vit}, task="rtms", progress=False)
    with pytest.raises(SpecError, match="at least one condition"):
        generalization({}, progress=False)
    for none in ([], {}, "vmi/rmts-both", [vit, "vmi/rmts-both"]):
        with pytest.raises(SpecError, match=r"generalization, 'b': .* is no model\. Give a HookedViT"):
            generalization({"a": vit, "b": none}, progress=False)  # type: ignore[dict-item]
    with pytest.raises(SpecError, match="at least one split"):
        generalization({"a": vit}, splits=[], progress=False)
    with pytest.raises(SpecError, match="do not fit side by side"):
        generalization({"a": vit}, cell=80, progress=False)
    with pytest.raises(SpecError, match="names no split"):
        generalization({"a": vit}, combinations="1-2-3", progress=False)
    with pytest.raises(SpecError, match="n=0: an accuracy takes at least one image"):
        generalization({"a": vit}, n=0, progress=False)


def test_what_does_not_fit_costs_no_model_that_does(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "answers", lambda *arguments, **options: pytest.fail("a model was asked"))
    vit = vmi.load(f"timm/{runs}/plain")
    torch.manual_seed(0)
    thousand, odd = (
        vmi.wrap(VisionTransformer(**{"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 64, **own}).eval())
        for own in ({"num_classes": 1000}, {"num_classes": 2, "patch_size": 32})
    )
    with pytest.raises(SpecError, match=r"generalization, 'b': VisionTransformer gives logits of shape \(1000,\), not one logit"):
        generalization({"a": vit, "b": thousand}, n=N, progress=False)
    with pytest.raises(SpecError, match="do not fit side by side"):
        generalization({"a": vit, "b": odd}, cell=64, n=N, progress=False)
    data = discrimination("val", 4, progress=False, **IMAGES)
    with pytest.raises(DataError, match=r"generalization, realistic: the data has no column 'label'"):
        generalization({"a": vit}, n=N, realistic=data.remove_columns("label"), progress=False)


def test_photographs_of_one_task_are_not_shown_to_models_of_the_other(runs: Path) -> None:
    data = discrimination("val", 6, progress=False, **IMAGES)
    record = trainings(runs)[2]
    matched = Training(**{**vars(record), "config": record.config.model_copy(update={"task": "rmts"})})
    models = {"discrimination": record, "rmts": matched}
    table = generalization(models, n=N, splits=["test"], realistic=data, progress=False).table
    assert set(table[table["split"] == "realistic"]["condition"]) == {"discrimination"}
    other = generalization(models, n=N, splits=["test"], realistic=data, realistic_task="rmts", progress=False).table
    assert set(other[other["split"] == "realistic"]["condition"]) == {"rmts"}


def test_accuracy_on_a_finite_training_set_is_of_that_set(runs: Path) -> None:
    record = trainings(runs)[2]
    finite = Training(**{**vars(record), "config": record.config.model_copy(update={"train_images": 10})})
    for recorded in (False, True):
        own = Training(**{**vars(finite), "test": {"train": {"accuracy": 0.5}, "test": {"accuracy": 0.5}}})
        table = generalization({"a": own}, n=N, splits=["train", "test"], recorded=recorded, progress=False).table
        assert table.groupby("split")["n_images"].first().to_dict() == {"train": 10, "test": N}


def test_records_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "training.json").write_text("half of it")
    with pytest.raises(DataError, match=r"holds no finished training\. Give the folder"):
        trainings(tmp_path)
    (tmp_path / "training.json").write_text(json.dumps({"config": {"stepz": 3}}))
    with pytest.raises(DataError, match=r"no readable record of a training \(1 settings are unknown"):
        trainings(tmp_path)
