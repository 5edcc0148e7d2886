"""The command line: what it prints, and that errors are one message and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import vit_mechinterp
from vit_mechinterp.cli import main
from vit_mechinterp.errors import SpecError


def test_an_error_is_one_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("runs:\n- {nmae: clean}\n")
    assert main(["run", str(path), "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"vit-mechinterp: {path}: runs.0.nmae: Unknown field 'nmae'. Close matches: name. "
        "Fields of Run: name, interventions, base, capture.\n"
    )
    with pytest.raises(SpecError, match="nmae"):
        main(["--debug", "run", str(path), "--out", str(tmp_path)])


def test_a_process_shows_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vit_mechinterp.cli", "plan", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"vit-mechinterp: Cannot read the document '{tmp_path / 'none.yaml'}': No such file or directory.\n"
    )


def test_help_loads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys\nfrom vit_mechinterp.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: print('LOADED', sorted({'torch', 'timm', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED []\n")
    for command in ("demo", "check", "sites", "plan", "run", "train", "schema"):
        assert f"\n    {command}" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"vit-mechinterp {vit_mechinterp.__version__}\n"


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Experiment"


def test_sites_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "timm/test_vit", "--random"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["site", "shape", "axes", "note"]
    assert lines[1] == ["embed", "101x64", "token", "d_model"]
    assert lines[7][:5] == ["blocks.0.attn.scores", "2x101x101", "head", "query", "key"]
    assert " ".join(lines[7][5:]) == "explicit attention in this block while read or written"
    assert lines[-1] == ["logits", "1000", "class"]


def test_check_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "timm/test_vit", "--random"]) == 0
    out = capsys.readouterr().out
    assert "passed  a pattern edit, by hand" in out
    assert out.endswith("The model conforms.\n")


def test_check_of_a_model_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vit_mechinterp.model.hooked.HookedViT.dropout", lambda vit: "blocks.0.drop")
    assert main(["check", "timm/test_vit", "--random"]) == 1
    assert "FAILED  eval mode" in capsys.readouterr().out


def test_unknown_models_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "vit_base"]) == 2
    assert "vit-mechinterp: 'vit_base' is no model string" in capsys.readouterr().err


def test_training_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--options"]) == 0
    assert "learning_rate" in json.loads(capsys.readouterr().out)["properties"]
    assert main(["train", "--out", str(tmp_path), "--set", "stpes=3"]) == 2
    assert "training options: stpes: There is no such key. Close matches: steps." in capsys.readouterr().err
    assert main(["train", "--out", str(tmp_path), "--set", "steps"]) == 2
    assert "--set takes KEY=VALUE, got 'steps'" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "train needs --out FOLDER" in capsys.readouterr().err


def test_training_writes_a_checkpoint_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.embed_dim=16", "model.depth=2", "model.num_heads=2", "canvas=64", "patch=16", "cell=32"]
    small += ["steps=2", "batch_size=4", "validate_every=2", "validation_images=4", "device=cpu"]
    config = tmp_path / "c.yaml"
    config.write_text("steps: 9\nseed: 3\n")
    sets = [part for setting in small for part in ("--set", setting)]
    assert main(["train", "--out", str(tmp_path / "run"), "--config", str(config), "--quiet", *sets]) == 0
    assert "Best checkpoint (step 2)" in capsys.readouterr().out
    record = (tmp_path / "run" / "training.json").read_text()
    assert "vit-mechinterp train --out" in record
    assert vit_mechinterp.load(f"timm/{tmp_path / 'run'}").layout.n_layers == 2


def test_a_run_without_labels_shows_mean_outputs() -> None:
    import torch

    from vit_mechinterp.cli import _summary

    logits = torch.tensor([[[1.0, 2.0], [3.0, 2.0]], [[0.0, 4.0], [0.0, 0.0]]])
    results = vit_mechinterp.Results(logits=logits, run_names=("clean", "swap"), captures={})
    title, head, *rows = _summary(results).splitlines()
    assert title == "Mean output over the 2 examples:"
    assert head.split() == ["logit_0", "logit_1"]
    assert [row.split() for row in rows] == [["clean", "2.000", "2.000"], ["swap", "0.000", "2.000"]]
