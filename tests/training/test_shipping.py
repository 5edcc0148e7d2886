"""A training is shipped in half precision, with the accuracies that it then has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vit_mechinterp.errors import DataError
from vit_mechinterp.training import ModelConfig, TrainingConfig, evaluate, train
from vit_mechinterp.training.config import EVALUATION_SPLITS
from vit_mechinterp.training.images import evaluation_images
from vit_mechinterp.training.records import Training
from vit_mechinterp.training.shipping import readme, ship

CONFIG = TrainingConfig(
    model=ModelConfig(embed_dim=32, depth=1, num_heads=2), canvas=64, steps=2, batch_size=4, validate_every=2,
    validation_images=8, test_images=8, test_splits=("test_iid",), device="cpu", auxiliary_site="blocks.0.resid_post",
)  # fmt: skip


def test_a_shipped_model_is_measured_as_it_is_stored(tmp_path: Path) -> None:
    train(CONFIG, tmp_path / "run", command="vit-mechinterp train --out run --quiet", progress=False)
    out = ship(tmp_path / "run", tmp_path / "shipped", progress=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", out))
    assert {value.dtype for value in after.values()} == {torch.float16}
    for name, value in before.items():
        assert torch.equal(value.half(), after[name]), name
    vit = Training.read(out).load()
    assert vit.dtype == torch.float32
    test = json.loads((out / "training.json").read_text())["test"]
    assert tuple(test) == EVALUATION_SPLITS
    assert test["ood-color"] == evaluate(vit, evaluation_images(CONFIG, "ood-color"), 8)
    card = (out / "README.md").read_text()
    assert card.startswith("# shipped\n")
    assert "with the disentanglement loss at `blocks.0.resid_post`" in card
    assert "    vit-mechinterp train --out run\n" in card
    assert f"{test['ood-color']['accuracy']:.4f}" in card
    with pytest.raises(DataError, match=r"shipped exists\. Remove it"):
        ship(tmp_path / "run", out)


def test_the_page_says_what_the_training_was() -> None:
    test = {split: {"accuracy": 0.9} for split in EVALUATION_SPLITS}
    progress = {"best_step": 2, "best": {"accuracy": 0.9}}

    def card(config: TrainingConfig) -> str:
        document = {"config": config.model_dump(), "test": test, "progress": progress, "command": "vit-mechinterp train"}
        return " ".join(readme("shipped", document, 1).split())

    usual = card(CONFIG)
    assert "started from random weights" in usual
    assert "Every training image was new: 2 steps of 4, AdamW, one-cycle learning rate up to 0.0005, seed 0" in usual
    finite = card(CONFIG.model_copy(update={"train_images": 6, "schedule": "constant", "model": "timm/vit_base_patch16_224"}))
    assert "started from its own weights" in finite
    assert "The 6 training images were shuffled every epoch: 2 steps of 4, AdamW, learning rate 0.0005 (constant)" in finite
    assert "measured on 8 images of every split (6 of train)" in finite


def test_an_unfinished_training_is_not_shipped(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(CONFIG, run, progress=False)
    document = json.loads((run / "training.json").read_text())
    del document["test"]
    (run / "training.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"run is not finished\. Resume it: vit-mechinterp train --out"):
        ship(run, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
