"""The checkpoints that ship with the package: they load as any model does, and are as good as their cards say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vit_mechinterp
from vit_mechinterp.model import load
from vit_mechinterp.stimuli import DiscriminationGenerator, discrimination
from vit_mechinterp.training import TrainingConfig, evaluate
from vit_mechinterp.training.images import evaluation_images

CHECKPOINTS = Path(vit_mechinterp.__file__).parent / "checkpoints"
NAMES = tuple(sorted(path.name for path in CHECKPOINTS.iterdir() if path.name[0] != "."))
N = 192


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_says_how_it_was_made(name: str) -> None:
    folder = CHECKPOINTS / name
    document = json.loads((folder / "training.json").read_text())
    config = TrainingConfig.model_validate(document["config"])
    assert name.startswith(config.task)
    assert (config.auxiliary_weight > 0) == ("disentangled" in name or "both" in name)
    assert bool(config.pipeline) == ("pipeline" in name or "both" in name)
    assert document["command"].startswith("vit-mechinterp train ")
    assert document["progress"]["step"] == config.steps
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    validations = {line["step"]: line["validation"] for line in lines if "validation" in line}
    best = validations[document["progress"]["best_step"]]
    assert best == document["progress"]["best"]
    card = (folder / "README.md").read_text()
    assert f"{document['test']['test']['accuracy']:.4f}" in card
    assert f"{document['test']['test_iid']['accuracy']:.4f}" in card


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_as_accurate_as_recorded(name: str) -> None:
    document = json.loads((CHECKPOINTS / name / "training.json").read_text())
    recorded = document["test"]["test"]["accuracy"]
    config = TrainingConfig.model_validate(document["config"])
    vit = load(f"vmi/{name}")
    images = evaluation_images(config, "test")
    accuracy = evaluate(vit.module, images, N)["accuracy"]
    spread = (recorded * (1 - recorded) / N) ** 0.5
    assert abs(accuracy - recorded) < 4 * spread
    if name == "discrimination-disentangled":
        assert recorded >= 0.95


def test_the_models_preprocessing_gives_the_images_of_its_training() -> None:
    vit = load("vmi/discrimination-disentangled")
    images = list(discrimination("val", 4, canvas=128)["base"])
    assert torch.equal(
        vit.preprocess(images), DiscriminationGenerator("val", canvas=128).batch(0, 4).images()
    )
