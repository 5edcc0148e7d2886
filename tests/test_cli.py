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
        "Fields of Run: name, interventions, base, capture, output.\n"
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
    for command in ("demo", "models", "check", "sites", "plan", "run", "train", "schema"):
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


OWN = '''
import torch, timm
from torch import nn

def tiny():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, drop_rate=0.1)

class Broken(nn.Module):
    def __init__(self):
        raise ValueError("no such width")

model = tiny()
number = 3
make_number = lambda: 3
'''


def test_check_of_ones_own_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_models_here.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("tiny", "model"):
        assert main(["check", f"own_models_here:{name}", "--json", "--fast"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["passed"] is True
        assert found["model"].startswith("VisionTransformer, timm.vit: 2 blocks, 3 heads of 8, width 24, cls + 2x2")
        assert {"check", "site", "passed", "detail", "deviation"} <= set(found["rows"][0])
        assert found["absent"]["blocks.0.mlp.pre_linear"] == "the MLP of this block is not gated"
    for name, text in {
        "own_models_her:tiny": "The Python module 'own_models_her' cannot be imported: ModuleNotFoundError",
        "own_models_here:tinny": "own_models_here has no 'tinny'. Close matches: tiny.",
        "own_models_here:Broken": "'own_models_here:Broken' could not be called without arguments: ValueError: no such",
        "own_models_here:number": "'own_models_here:number' is a int, and no module of torch, nor callable",
        "own_models_here:make_number": "wrap takes a torch module, not int",
    }.items():
        assert main(["check", name]) == 2
        assert text in capsys.readouterr().err


def test_check_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=16)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert main(["check", "./mine", "--fast"]) == 0
    assert "ViTModel, transformers.vit: 2 blocks" in capsys.readouterr().out
    (tmp_path / "mine" / "model.safetensors").rename(tmp_path / "mine" / "pytorch_model.bin")
    assert main(["check", "./mine"]) == 2
    assert "allow_pickle=True" in capsys.readouterr().err


def test_models_are_listed_with_what_they_lack(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--library", "timm", "--search", "samvit_base_patch16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "family", "layout", "lacks", "(reason", "below)"]
    assert lines[1].startswith("timm/samvit_base_patch16 ")
    assert "timm.sam  12 blocks, 12 heads of 64, width 768, 64x64 patches of 16x16 px" in lines[1]
    assert "attn.q, attn.k, attn.v, attn.scores, attn.pattern, attn.z, attn.result (3)" in lines[1].replace(
        "attn.result, attn.", "attn."
    )
    assert any("blocks 0-1, 3-4, 6-7, 9-10: this block attends within windows of 14 x 14 tokens" in line for line in lines)
    assert lines[-1].startswith("2 models (2 of timm), verified with timm ")

    assert main(["models", "--library", "hf", "--search", "dinov2-base", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {model["name"] for model in found["models"]} >= {"Dinov2Model", "Dinov2ForImageClassification"}
    assert {model["row"] for model in found["models"]} == {"transformers.dinov2"}
    assert found["models"][0]["growth"] == "yes"


def test_models_that_are_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--library", "tim"]) == 2
    assert "The catalogue has no library 'tim'. Close matches: timm. It has: timm, hf" in capsys.readouterr().err
    assert main(["models", "--search", "vit_base_patch16_225"]) == 1
    assert "The catalogue lists no model with 'vit_base_patch16_225'" in (out := capsys.readouterr().out)
    assert "Close matches: 'timm/vit_base_patch16_224'" in out
    assert main(["models", "--search", "resnet18"]) == 1
    assert "timm/resnet18 is not supported. No known family of ViTs describes" in capsys.readouterr().out


def test_listing_models_loads_no_library() -> None:
    code = (
        "import sys\nfrom vit_mechinterp.cli import main\nmain(['models'])\n"
        "print('LOADED', sorted({'torch', 'timm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED []\n")


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

    from vit_mechinterp.commands.analyses import _summary

    logits = torch.tensor([[[1.0, 2.0], [3.0, 2.0]], [[0.0, 4.0], [0.0, 0.0]]])
    results = vit_mechinterp.Results(logits=logits, run_names=("clean", "swap"), captures={})
    title, head, *rows = _summary(results).splitlines()
    assert title == "Mean output over the 2 examples:"
    assert head.split() == ["logit_0", "logit_1"]
    assert [row.split() for row in rows] == [["clean", "2.000", "2.000"], ["swap", "0.000", "2.000"]]


def test_runs_without_output_show_none() -> None:
    import torch

    from vit_mechinterp.commands.analyses import _summary

    results = vit_mechinterp.Results(torch.zeros(0, 2, 3), run_names=(), captures={})
    assert _summary(results) == "No run has an output; what they captured is in the results."


def test_a_run_with_a_readout_shows_means_of_what_it_keeps() -> None:
    import torch

    from vit_mechinterp.commands.analyses import _summary

    names, labels = ("clean", "swap"), {"label": [0, 1]}
    loss = {"readout": {"op": "cross_entropy", "answer": "label"}}
    logits = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    results = vit_mechinterp.Results(logits, names, captures={}, labels=labels, provenance=loss)
    title, head, *rows = _summary(results).splitlines()
    assert title == "Mean over the 2 examples:"
    assert head.split() == ["cross_entropy"]
    assert [row.split() for row in rows] == [["clean", "1.500"], ["swap", "4.000"]]
    some = {"readout": {"op": "selected_logits", "classes": [7, "label"]}}
    selected = vit_mechinterp.Results(logits[:, :, None].expand(2, 2, 2), names, captures={}, labels=labels, provenance=some)
    assert _summary(selected).splitlines()[1].split() == ["logit_7", "logit_label"]
