"""Two processes train as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.test_training import lines_of, tiny
from vit_mechinterp.training import train


@pytest.mark.slow
def test_two_processes_take_the_steps_that_one_takes(tmp_path: Path) -> None:
    stages = [{"attention": "within_object", "layers": [0]}]
    # Accumulated parts on top, so that each process has two of the four quarters of a step.
    config = tiny(steps=6, validate_every=3, log_every=1, threads=1, pipeline=stages, accumulate=2)
    train(config, tmp_path / "one", progress=False)
    (tmp_path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = ["-m", "vit_mechinterp.cli", "train", "--config", "config.yaml", "--out", "two", "--quiet"]
    done = subprocess.run([*launch, *command], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Best checkpoint") == 1

    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert len(one) == len(two) == 8
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours.get("gradient_norm", 0) == pytest.approx(theirs.get("gradient_norm", 0), rel=1e-4)
        assert ours.get("pipeline_loss", 0) == pytest.approx(theirs.get("pipeline_loss", 0), rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)
