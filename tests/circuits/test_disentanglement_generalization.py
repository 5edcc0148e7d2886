"""Fig. 6 of Lepori et al. 2024, against the coefficients that follow from the published accuracies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vit_mechinterp.circuits.correlation import correlation, fisher_interval, pearson, spearman
from vit_mechinterp.circuits.disentanglement_generalization import disentanglement_generalization
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.errors import DataError, SpecError

SPLITS = ("test_iid", "test", "ood-shape-color")

# Model: (shape, colour), accuracies on the three splits; 32-32-224, from the paper's logs.
DISCRIMINATION: dict[str, tuple[tuple[float, float], tuple[float, float, float]]] = {
    "CLIP": ((0.937, 0.928), (0.9847, 0.9847, 0.9516)),
    "DINO": ((0.910, 0.932), (0.9228, 0.9469, 0.8413)),
    "ImageNet": ((0.903, 0.945), (0.9572, 0.9572, 0.8789)),
    "MAE": ((0.710, 0.823), (0.9487, 0.9488, 0.8505)),
    "DINOv2": ((0.922, 0.924), (0.9854, 0.9853, 0.9470)),
    "scratch": ((0.501, 0.073), (0.7650, 0.7597, 0.5972)),
}
RMTS: dict[str, tuple[tuple[float, float], tuple[float, float, float]]] = {
    "CLIP": ((0.906, 0.904), (0.9802, 0.9830, 0.8508)),
    "DINO": ((0.784, 0.841), (0.9470, 0.8523, 0.6828)),
    "ImageNet": ((0.808, 0.885), (0.9233, 0.8398, 0.6827)),
    "MAE": ((0.580, 0.622), (0.8527, 0.8527, 0.6897)),
    "DINOv2": ((0.885, 0.940), (0.9643, 0.9472, 0.8200)),
}


def points(values: Any, task: str = "discrimination") -> pd.DataFrame:
    return pd.DataFrame(
        {"task": task, "model": model, "shape": shape, "color": color, "split": split, "accuracy": accuracy}
        for model, ((shape, color), accuracies) in values.items()
        for split, accuracy in zip(SPLITS, accuracies, strict=True)
    )


def test_the_published_accuracies_give_the_known_coefficients() -> None:
    table = pd.concat([points(DISCRIMINATION), points(RMTS, "rmts")])
    result = disentanglement_generalization(table)
    first = result.table.groupby(["task", "split"])["pearson"].first()
    assert [round(first["discrimination", split], 3) for split in SPLITS] == [0.948, 0.974, 0.948]
    assert [round(first["rmts", split], 3) for split in SPLITS] == [0.954, 0.615, 0.637]
    scratch = result.table[result.table["model"] == "scratch"].set_index("split")
    assert [round(scratch["pearson_without"][split], 3) for split in SPLITS] == [0.272, 0.497, 0.497]
    assert (
        'Discrimination, IID: r = 0.95 [0.59, 0.99], rank correlation 0.77; lowest without "scratch", 0.27 (6 models)'
        in result.description
    )
    assert result.summary["Pearson r, discrimination, compositional"] == pytest.approx(0.974, abs=5e-4)
    clip = result.table.iloc[0]
    assert (clip["n_models"], clip["disentanglement"]) == (6, pytest.approx(0.9325))
    figure = result.figures()["disentanglement_generalization"]
    assert [axes.get_title(loc="left") for axes in figure.axes][:2] == ["discrimination, IID", "discrimination, compositional"]
    assert "r = 0.95 [0.59, 0.99]\nwithout one: 0.27 to 0.99" in figure.axes[0].texts[0].get_text()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(DISCRIMINATION)


def test_coefficients_and_intervals_are_those_of_scipy() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=9)
    y = np.round(x + draw.normal(size=9), 1)
    found = correlation(x, y)
    reference = stats.pearsonr(x, y)
    assert found.pearson == pytest.approx(reference.statistic)
    assert found.fisher == pytest.approx(tuple(reference.confidence_interval(0.95)))
    without = stats.pearsonr(np.delete(x, 2), np.delete(y, 2)).statistic
    assert found.pearson_without[2] == pytest.approx(without)
    assert abs(without - found.pearson) > 1e-3
    tied = y.copy()
    tied[3] = tied[4]
    assert spearman(x, tied) == pytest.approx(stats.spearmanr(x, tied).statistic)
    low, high = found.pearson_bootstrap
    assert -1 <= low < found.pearson < high <= 1


def test_few_or_equal_points_have_no_coefficient() -> None:
    assert np.isnan(pearson(np.array([0.1, 0.2]), np.array([0.3, 0.4])))
    assert np.isnan(pearson(np.full(4, 0.3), np.arange(4.0)))
    assert np.isnan(fisher_interval(0.5, 3)).all()
    assert pearson(np.arange(3.0), np.arange(3.0) * 1e-6) == pytest.approx(1)


def das_result(model: str, source: str, accuracies: dict[str, list[float]], split: str = "iid") -> CircuitResult:
    table = pd.DataFrame(
        {"attribute": attribute, "control": control, "seed": 0, "layer": layer, "split": name, "accuracy": value,
         "accuracy_low": value - 0.03 - 0.01 * layer, "accuracy_high": value + 0.05}
        for attribute, values in accuracies.items()
        for control, change in (("none", 0.0), ("wrong_object", 0.9))
        for name, shift in ((split, 0.0), ("compositional", -0.1))
        for layer, value in enumerate(value + change + shift for value in values)
    )
    return CircuitResult(name="das", table=table, provenance={"model": model, "model_source": source})


def generalization_result(models: dict[str, str]) -> CircuitResult:
    rows = [
        {"condition": name, "task": "discrimination", "split": split, "seed": seed, "accuracy": accuracy,
         "accuracy_low": accuracy - 0.02, "accuracy_high": accuracy + 0.02}
        for k, name in enumerate(models)
        for split, accuracy in (("test_iid", 0.7 + 0.1 * k), ("test", 0.6 + 0.05 * k * k), ("train", 1.0))
        for seed in ("0", "all")
    ]  # fmt: skip
    provenance = {"models": {f"{name}, seed 0": fingerprint for name, fingerprint in models.items()}}
    return CircuitResult(name="generalization", table=pd.DataFrame(rows), provenance=provenance)


def folder_of(path: Path, models: dict[str, str]) -> Path:
    best = {"none": 0.5, "disentangled": 0.8, "both": 0.9}
    for k, (name, value) in enumerate(best.items()):
        values = {"shape": [0.1, value, 0.2], "color": [value + 0.1, 0.3, 0.2]}
        das_result(f"print{k}", f"runs/{name}", values).save(path / name / "das")
    generalization_result(models).save(path / "behaviour")
    CircuitResult(name="attention_stages", table=pd.DataFrame({"layer": [0]})).save(path / "none" / "stages")
    return path


def test_a_folder_of_results_gives_one_point_per_model(tmp_path: Path) -> None:
    models = {"plain": "print0", "with loss": "print1", "with both": "print2"}
    result = disentanglement_generalization(folder_of(tmp_path, models))
    iid = result.table[result.table["split"] == "test_iid"].set_index("model")
    assert iid["disentanglement"].to_dict() == pytest.approx({"plain": 0.55, "with loss": 0.85, "with both": 0.95})
    assert iid["shape"]["plain"] == 0.5
    # Shape is best in layer 1, colour in layer 0.
    assert iid["disentanglement_low"]["plain"] == pytest.approx(0.55 - (0.04 + 0.03) / 2)
    assert iid["disentanglement_high"]["plain"] == pytest.approx(0.6)
    (axes, _) = result.figures()["disentanglement_generalization"].axes
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert [pytest.approx([0.515, 0.7]), pytest.approx([0.6, 0.7])] in lines
    assert iid["accuracy"].to_dict() == pytest.approx({"plain": 0.7, "with loss": 0.8, "with both": 0.9})
    expected = stats.pearsonr([0.55, 0.85, 0.95], [0.7, 0.8, 0.9]).statistic
    assert iid["pearson"].iloc[0] == pytest.approx(expected)
    assert set(result.table["split"]) == {"test_iid", "test"}
    assert json.loads((result.save(tmp_path / "out") / "provenance.json").read_text())["models"] == ["print0", "print1", "print2"]
    harder = disentanglement_generalization(tmp_path, das_split="compositional")
    assert harder.table.set_index("model")["disentanglement"]["plain"].tolist() == pytest.approx([0.45] * 2)


def test_results_of_other_models_are_refused_by_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"plain": "print0", "with loss": "another", "recorded": "recorded by the training"})
    with pytest.raises(DataError, match=r"das: no accuracies of this model, runs/\w+ \(fingerprint print\d\), on test_iid.* belong to plain \(print0\); with loss \(another\); recorded \(no fingerprint, recorded by the training\)"):  # fmt: skip
        disentanglement_generalization(folder)
    das = das_result("print0", "runs/none", {"shape": [0.5]})
    with pytest.raises(DataError, match=r"There is no result of 'generalization' among 1 results \(das\)"):
        disentanglement_generalization([das])
    with pytest.raises(DataError, match="shape was searched in runs/none before, in result 0"):
        disentanglement_generalization([das, das, generalization_result({"plain": "print0"})])
    models = {"plain": "print0", "with loss": "print1"}
    both = das_result("print1", "runs/disentangled", {"shape": [0.5], "color": [0.6]})
    with pytest.raises(DataError, match=r"result 0 \(das\): color was not searched in runs/none, but in other models"):
        disentanglement_generalization([das, both, generalization_result(models)])
    with pytest.raises(DataError, match="at least three models on one split; here are plain"):
        disentanglement_generalization([das, generalization_result({"plain": "print0"})])
    with pytest.raises(DataError, match="not measured on split 'ood', but on iid, compositional"):
        disentanglement_generalization(folder, das_split="ood")
    with pytest.raises(DataError, match="nowhere is no folder"):
        disentanglement_generalization(tmp_path / "nowhere")
    with pytest.raises(SpecError, match="at least one split"):
        disentanglement_generalization(folder, splits=[])
    with pytest.raises(DataError, match="The points lack split; they have model, accuracy, disentanglement"):
        disentanglement_generalization(pd.DataFrame({"model": ["a"], "accuracy": [1.0], "disentanglement": [1.0]}))
    for wrong in (float("nan"), "high"):
        odd = points(RMTS).astype({"accuracy": object})
        odd.loc[0, "accuracy"] = wrong
        with pytest.raises(DataError, match=rf"The accuracy of '\w+' on split '\w+' is '?{wrong}'?; a point takes two finite"):
            disentanglement_generalization(odd)
    with pytest.raises(SpecError, match="resamples=0: an interval takes at least 1"):
        disentanglement_generalization(points(RMTS), resamples=0)
    twice = pd.concat([points(RMTS), points({"CLIP": RMTS["CLIP"]})])
    with pytest.raises(DataError, match="'CLIP' occurs twice on split 'test_iid'"):
        disentanglement_generalization(twice)
