"""The paper's models by name: their settings, and the whole way offline with a small model in their place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import vit_mechinterp as vmi
from tests.training import test_any_model as tiny_models
from vit_mechinterp.cli import main
from vit_mechinterp.errors import SpecError
from vit_mechinterp.training import PRESETS, Training, TrainingConfig, preset

FEW = {"train_images": 8, "batch_size": 4, "steps": 1, "validation_images": 4, "test_images": 4}


def test_every_preset_is_a_training_in_the_papers_geometry() -> None:
    for name, entry in PRESETS.items():
        config = preset(name)
        patch = int(entry.label.rpartition("/")[2])
        cell = {16: 32, 32: 32, 14: 28}[patch]
        assert (config.canvas, config.patch, config.cell) == (224, patch, cell)
        assert config.geometry.tokens_per_object == (1 if patch == 32 else 4)
        assert (config.train_images, config.preset) == (6400, name)
        assert config.pretrained == (entry.pretraining_images > 0)
        epochs = config.steps * config.batch_size / 6400
        assert epochs == (30 if config.pretrained else 200)
    assert preset("clip-b32", seed=3, combinations="32-32-224").seed == 3
    assert preset("dinov2-b14").learning_rate == 1e-6
    assert preset("mae-b16").model_options == {"mask_ratio": 0.0}
    with pytest.raises(SpecError, match=r"no preset 'clip_b16'\. Close matches: clip-b16.*DINO ViT-B/16: hf/face"):
        preset("clip_b16")


@pytest.mark.parametrize(
    ("name", "make", "patch"),
    [
        ("clip-b16", tiny_models.clip, 16),
        ("clip-b32", tiny_models.whole_clip, 32),
        ("imagenet21k-b16", tiny_models.bare_vit, 16),
        ("mae-b16", tiny_models.mae, 16),
        ("dinov2-b14", tiny_models.dinov2, 14),
    ],
)
def test_a_preset_runs_offline_with_a_local_folder(
    name: str, make: Callable[[], nn.Module], patch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny_models.SIZES, "image_size", 224)
    monkeypatch.setitem(tiny_models.SIZES, "patch_size", patch)
    make().save_pretrained(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {**FEW, "model": "hf/./own", "test_splits": ["ood-shape"], "device": "cpu"}
    settings = [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    assert main(["train", "--preset", name, "--out", "run", "--quiet", *settings]) == 0

    record = Training.read("run")
    assert record.config == TrainingConfig.model_validate({**preset(name).model_dump(), **changes})
    assert (record.model, record.pretraining) == (PRESETS[name].label, PRESETS[name].pretraining)
    assert list(record.test) == ["ood-shape"]
    vit = vmi.load("hf/./run")
    assert (vit.layout.tokens.image_size, vit.layout.tokens.patch_size) == ((224, 224), (patch, patch))
    assert tuple(vit(vit.blank(1)).shape) == (1, 2)


def test_the_command_names_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(PRESETS) in shown.replace("- ", "-")
    assert main(["train", "--preset", "clip", "--out", "nowhere"]) == 2
    assert "There is no preset 'clip'" in capsys.readouterr().err
