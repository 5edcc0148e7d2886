"""Image sets: folders with the features of the sets of the hub stand in for them, and what is lacking is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from vit_mechinterp.cli import main
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.report import jelassi2022
from vit_mechinterp.training import image_sets
from vit_mechinterp.training.image_sets import image_set

CLASSES = {"image": Image(), "label": ClassLabel(num_classes=4)}
FEATURES: dict[str, dict[str, Any]] = {
    "cifar10": {"img": Image(), "label": ClassLabel(num_classes=4)},
    "cifar100": {"img": Image(), "fine_label": ClassLabel(num_classes=4), "coarse_label": ClassLabel(num_classes=2)},
    "svhn": CLASSES,
    "imagenet": CLASSES,
}


def split(features: dict[str, Any], n: int, seed: int, size: tuple[int, int] = (32, 32), known: bool = True) -> Dataset:
    """Noise whose mean colour is its class; sorted by class."""
    draw = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {name: [] for name in features}
    for number in range(n):
        label = number * 4 // n
        values = np.clip(draw.normal(40 + 50 * label, 5, (*size, 3)), 0, 255).astype("uint8")
        for name, feature in features.items():
            if isinstance(feature, Image):
                rows[name].append(Pillow.fromarray(values))
            else:
                rows[name].append((label // 2 if name == "coarse_label" else label) if known else -1)
    return Dataset.from_dict(rows, features=Features(features))


@pytest.mark.parametrize("name", list(FEATURES))
def test_sets_of_the_hub_are_read_by_their_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, asked = FEATURES[name], []

    def load(path: str, config: str | None = None, streaming: bool = False) -> Any:
        asked.append((path, config))
        held = {"train": split(features, 16, 0, (40, 48)), "test": split(features, 8, 1, known=name != "imagenet")}
        if name == "imagenet":
            held["validation"] = split(features, 12, 2)
        return DatasetDict(held) if not streaming else {k: v.to_iterable_dataset() for k, v in held.items()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = image_set(name, limit=12)
    assert asked == [(image_sets._HUB[name]["path"], "cropped_digits" if name == "svhn" else None)]
    size = 64 if name == "imagenet" else 32
    assert found.train.shape == (12, 3, size, size)
    # ImageNet keeps the labels of its test images, so the validation images are held out.
    assert len(found.test) == (12 if name == "imagenet" else 8)
    assert found.n_classes == 4
    assert len(set(found.train_labels.tolist())) > 2
    # Brighter images have larger labels: pixels and labels belong together, in both splits.
    for images, labels in ((found.train, found.train_labels), (found.test, found.test_labels)):
        assert np.corrcoef(images.mean((1, 2, 3)), labels)[0, 1] > 0.95
    assert float(found.train.mean()) == pytest.approx(0, abs=1e-4)
    assert float(found.train.std()) == pytest.approx(1, abs=1e-3)


def test_folders_stand_in_for_them(tmp_path: Path) -> None:
    whole = DatasetDict(train=split(FEATURES["cifar100"], 12, 0), test=split(FEATURES["cifar100"], 8, 1))
    whole.save_to_disk(tmp_path / "stored")
    (tmp_path / "parquet").mkdir()
    for name, own in whole.items():
        own.to_parquet(tmp_path / "parquet" / f"{name}-00000.parquet")
        for number, row in enumerate(own):
            folder = tmp_path / "images" / name / f"class{row['fine_label']}"
            folder.mkdir(parents=True, exist_ok=True)
            row["img"].save(folder / f"{number}.png")
    stored, parquet, images = (image_set(tmp_path / name) for name in ("stored", "parquet", "images"))
    for other in (parquet, images):
        order, place = (torch.argsort(s.train.mean((1, 2, 3))) for s in (stored, other))
        torch.testing.assert_close(stored.train[order], other.train[place])
        assert stored.train_labels[order].tolist() == other.train_labels[place].tolist()
        assert other.n_classes == 4
    assert image_set(tmp_path / "stored", size=16).size == 16


def test_a_folder_is_compared_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = jelassi2022._SIZES["tiny"] | {"steps": 2, "seeds": (0,)}
    monkeypatch.setitem(jelassi2022._SIZES, "tiny", sizes)
    DatasetDict(train=split(CLASSES, 8, 0), test=split(CLASSES, 8, 1)).save_to_disk(tmp_path / "mine")
    words = ["reproduce", "jelassi2022", "--only", "comparison", "--quiet", "--out", str(tmp_path / "out")]
    assert main([*words, "--data", str(tmp_path / "mine")]) == 0
    assert "real images: mine" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_what_is_lacking_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(name: str, **splits: Dataset) -> Path:
        DatasetDict(splits).save_to_disk(tmp_path / name)
        return tmp_path / name

    own = split(CLASSES, 4, 0)
    plain = Dataset.from_dict({"text": ["a"], "label": [0]}, features=Features({"text": Value("string"), "label": Value("int64")}))
    two = Dataset.from_dict({"image": own["image"], "a": [0] * 4, "b": [1] * 4}, features=Features(
        {"image": Image(), "a": ClassLabel(num_classes=2), "b": ClassLabel(num_classes=2)}
    ))  # fmt: skip
    (tmp_path / "empty").mkdir()
    for path, message in (
        (folder("untrained", test=own), "has no split 'train'. Splits: test"),
        (folder("all", train=own), "no held-out split with labels .* Splits: train"),
        (folder("hidden", train=own, test=split(CLASSES, 4, 1, known=False)), "no held-out split with labels"),
        (folder("text", train=plain, test=plain), r"no image column of type Image.* Columns: text \(Value\), label"),
        (folder("two", train=two, test=two), r"no label column .* Columns: image \(Image\), a \(ClassLabel\)"),
        (tmp_path / "empty", "is no data set that `datasets` reads"),
    ):
        with pytest.raises(DataError, match=message):
            image_set(path)

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"'svhn' \(ufldl-stanford/svhn on .* hub\) cannot be read: no route.*name a folder"):
        image_set("svhn")
    with pytest.raises(SpecError, match=r"no image set or folder 'cifar'. Image sets: digits, cifar10, .*Close matches"):
        image_set("cifar")
    with pytest.raises(SpecError, match="limit=0 is not positive"):
        image_set("digits", limit=0)
