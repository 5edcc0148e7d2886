"""A document gives the same numbers from the command line, from Python, and run by run by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vit_mechinterp as vmi
from vit_mechinterp.cli import main
from vit_mechinterp.errors import DataError, ExecutionError, SpecError, TensorFileError

N, SIDE, WIDTH = 5, 32, 16

DOCUMENT = """\
model: hf/./model
data: {saved: pairs}
tensors:
  probe: {file: tensors.safetensors, key: probe}
batch_size: 4
runs:
- {name: clean}
- name: swap{layer}
  interventions:
  - {op: interchange, site: blocks.0.resid_post, tokens: {column: edited_tokens}, source: source}
  capture: [pooled]
  over: {layer: [0, 1]}
- name: composed
  interventions:
  - {op: add_direction, site: blocks.0.resid_mid, tokens: cls, vector: probe, alpha: 4}
  - op: inject_subspace
    site: blocks.1.resid_pre
    basis: {file: tensors.safetensors, key: basis}
    source: source
  - {op: interchange, site: blocks.1.attn.z, heads: 1, source: {run: swap0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment: document, model, saved data and tensors."""
    from datasets import Dataset
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("experiment")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=8,
        num_labels=2,
        initializer_range=0.3,
    )
    ViTForImageClassification(config).eval().save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "model")

    numbers = np.random.default_rng(0)
    pixels = numbers.integers(0, 256, (2, N, SIDE, SIDE, 3), dtype=np.uint8)
    columns: dict[str, Any] = {
        name: [Image.fromarray(image) for image in images]
        for name, images in zip(("base", "source"), pixels, strict=True)
    }
    columns |= {"label": [0, 1, 0, 1, 1], "edited_tokens": [[n, n + 4] for n in range(N)]}
    Dataset.from_dict(columns).save_to_disk(folder / "pairs")
    basis = torch.linalg.qr(torch.randn(WIDTH, 3)).Q.contiguous()
    save_file({"probe": torch.randn(WIDTH), "basis": basis}, folder / "tensors.safetensors")
    (folder / "experiment.yaml").write_text(DOCUMENT)
    return folder


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> vmi.Results:
    """The same runs put together in Python."""
    from datasets import load_from_disk
    from safetensors.torch import load_file

    tensors = load_file(folder / "tensors.safetensors")
    swap = vmi.Interchange(site="blocks.0.resid_post", tokens={"column": "edited_tokens"}, source="source")
    runs = [
        vmi.Run(name="clean"),
        *(vmi.Run(name=f"swap{n}", interventions=[swap.at(layer=n)], capture=["pooled"]) for n in range(2)),
        vmi.Run(
            name="composed",
            interventions=[
                vmi.AddDirection(site="blocks.0.resid_mid", tokens="cls", vector="probe", alpha=4),
                vmi.InjectSubspace(site="blocks.1.resid_pre", basis="basis", source="source"),
                vmi.Interchange(site="blocks.1.attn.z", heads=1, source={"run": "swap0"}),
            ],
        ),
    ]
    vit = vmi.load(f"hf/{folder / 'model'}")
    return vmi.execute(vit, runs, load_from_disk(folder / "pairs"), tensors=tensors, batch_size=4, progress=False)


def assert_same_bits(one: vmi.Results, other: vmi.Results) -> None:
    assert one.run_names == other.run_names == ("clean", "swap0", "swap1", "composed")
    assert torch.equal(one.logits, other.logits)
    for run in ("swap0", "swap1"):
        assert torch.equal(one.captures[run]["pooled"], other.captures[run]["pooled"])
    # Every run differs from the clean one, so equality says something.
    assert all(float((one.logits[0] - row).abs().max()) > 1e-3 for row in one.logits[1:])


def test_command_line_and_python_give_the_same_bits(
    folder: Path, by_hand: vmi.Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--store", str(tmp_path / "store"), "--memory", "1GiB"]
    assert main(["run", str(folder / "experiment.yaml"), "--out", str(tmp_path / "out"), "--quiet", *options]) == 0
    out = capsys.readouterr().out
    assert list((tmp_path / "store").glob("*/*/*.safetensors"))
    assert main(["plan", str(folder / "experiment.yaml"), "--memory", "1 kB"]) == 2
    assert "memory='1 kB' is too little" in capsys.readouterr().err
    labels = torch.tensor(by_hand.labels["label"])
    assert out.startswith("Share of the 5 examples whose prediction equals the column:")
    for run in by_hand.run_names:
        share = float((by_hand[run].argmax(dim=1) == labels).float().mean())
        assert any(line.split() == [run, f"{share:.3f}"] for line in out.splitlines())
    assert_same_bits(vmi.Results.load(tmp_path / "out"), by_hand)


def test_the_saved_document_gives_the_same_from_anywhere(
    folder: Path, by_hand: vmi.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmi.run_experiment(folder / "experiment.yaml", tmp_path / "first", progress=False)
    (tmp_path / "first").rename(tmp_path / "moved")  # the folder of results may travel
    monkeypatch.chdir(tmp_path)
    assert_same_bits(vmi.run_experiment("moved/experiment.yaml", "second", progress=False), by_hand)
    # A second generation, and one into its own folder, are as good.
    assert_same_bits(vmi.run_experiment("second/experiment.yaml", "second", progress=False), by_hand)
    saved = vmi.Experiment.from_yaml("second/experiment.yaml")
    assert saved == vmi.Experiment.from_yaml("moved/experiment.yaml")
    assert saved.model == f"hf/{folder / 'model'}"
    assert len(list((tmp_path / "second" / "tensors").iterdir())) == 1
    copy = tmp_path / "second" / saved.tensors["probe"].file
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    with pytest.raises(TensorFileError, match="is not the file that was meant"):
        vmi.run_experiment("second/experiment.yaml", progress=False)


def test_the_saved_document_holds_what_was_given_in_python(folder: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    given = {"probe": torch.linspace(-1, 1, WIDTH)}
    path = folder / "experiment.yaml"
    vit, data = vmi.load(f"hf/{folder / 'model'}"), load_from_disk(folder / "pairs")
    results = vmi.run_experiment(path, tmp_path / "out", vit=vit, data=data, tensors=given, progress=False)
    saved = vmi.Experiment.from_yaml(tmp_path / "out" / "experiment.yaml")
    assert saved.data is None
    assert saved.model == f"hf/{folder / 'model'}"
    again = vmi.run_experiment(saved, data=data, progress=False)
    assert torch.equal(again.logits, results.logits)
    assert not torch.equal(results["composed"], vmi.run_experiment(path, progress=False)["composed"])
    own = vmi.wrap(vit.module)
    vmi.run_experiment(path, tmp_path / "own", vit=own, progress=False)
    assert vmi.Experiment.from_yaml(tmp_path / "own" / "experiment.yaml").model is None


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def computed(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("vit_mechinterp.engine.execute", computed)
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ExecutionError, match=r"Results cannot be written into .*file.*Choose another folder"):
            vmi.run_experiment(folder / "experiment.yaml", out, progress=False)
    assert main(["run", str(folder / "experiment.yaml"), "--out", str(tmp_path / "file"), "--quiet"]) == 2
    assert "vit-mechinterp: Results cannot be written into" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="computed"):
        vmi.run_experiment(folder / "experiment.yaml", tmp_path / "out", progress=False)


def test_the_same_from_python_from_any_folder(
    folder: Path, by_hand: vmi.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = vmi.Experiment.from_yaml(folder / "experiment.yaml")
    assert_same_bits(vmi.run_experiment(experiment, "out", progress=False), by_hand)
    saved = vmi.Experiment.from_yaml(tmp_path / "out" / "experiment.yaml")
    assert [entry.name for entry in saved.runs] == [entry.name for entry in experiment.runs]


def test_what_the_document_names_can_be_replaced(folder: Path, by_hand: vmi.Results) -> None:
    experiment = vmi.Experiment.from_yaml(folder / "experiment.yaml")
    given = {"probe": torch.zeros(WIDTH)}
    results = vmi.run_experiment(experiment, tensors=given, progress=False)
    assert torch.equal(results["swap1"], by_hand["swap1"])
    assert not torch.equal(results["composed"], by_hand["composed"])


def test_plan_prints_the_cost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder / "experiment.yaml"), "--per-example"]) == 0
    experiment = vmi.Experiment.from_yaml(folder / "experiment.yaml")
    plan = vmi.plan(vmi.load(f"hf/{folder / 'model'}"), experiment, batch_size=experiment.batch_size)
    assert str(plan) in capsys.readouterr().out


def test_plan_and_run_share_a_store(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, store = str(folder / "experiment.yaml"), ["--store", str(tmp_path / "store")]
    stored = "everything that clean forwards give is stored"
    assert main(["plan", document, *store]) == 0
    assert stored not in capsys.readouterr().out
    assert main(["run", document, "--out", str(tmp_path / "out"), "--quiet", *store]) == 0
    assert main(["plan", document, *store]) == 0
    assert stored in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "error", "text"),
    [
        ("hf/./model", "hf/./modle", Exception, "modle"),
        ("saved: pairs", "saved: piars", DataError, "piars holds no dataset written by save_to_disk"),
        ("saved: pairs", "stimuli: discriminatoin", SpecError, "There are no stimuli 'discriminatoin'"),
        ("file: tensors.safetensors, key: probe", "file: none.safetensors, key: probe", TensorFileError, "no tensor file"),
        ("model: hf/./model\n", "", SpecError, "names no model"),
        ("data: {saved: pairs}\n", "", SpecError, "names no data"),
    ],
)
def test_what_cannot_be_loaded_is_said(folder: Path, old: str, new: str, error: type[Exception], text: str) -> None:
    assert old in DOCUMENT
    path = folder / "changed.yaml"
    path.write_text(DOCUMENT.replace(old, new))
    with pytest.raises(error, match=text):
        vmi.run_experiment(path, progress=False)


def test_several_splits_are_refused(folder: Path) -> None:
    from datasets import DatasetDict, load_from_disk

    DatasetDict({"train": load_from_disk(folder / "pairs")}).save_to_disk(folder / "splits")
    experiment = vmi.Experiment(data={"saved": str(folder / "splits")}, runs=[vmi.Run(name="clean")])
    with pytest.raises(DataError, match=r"holds several splits \(train\)"):
        vmi.run_experiment(experiment, vit=vmi.load(f"hf/{folder / 'model'}"))


def test_a_truncated_tensor_file_is_said(folder: Path) -> None:
    whole = (folder / "tensors.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-40])
    path = folder / "changed.yaml"
    path.write_text(DOCUMENT.replace("tensors.safetensors", "cut.safetensors"))
    with pytest.raises(TensorFileError, match=r"cut\.safetensors is no readable safetensors file"):
        vmi.run_experiment(path, progress=False)


def test_results_say_where_they_come_from(by_hand: vmi.Results) -> None:
    assert json.dumps(dict(by_hand.provenance))
