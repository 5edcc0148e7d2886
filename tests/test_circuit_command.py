"""``vit-mechinterp circuit``: every analysis from words alone, on files, folders and datasets."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import vit_mechinterp as vmi
from tests import tiny_models
from vit_mechinterp import circuits
from vit_mechinterp.cli import main
from vit_mechinterp.commands.circuit import CIRCUITS
from vit_mechinterp.commands.circuit_settings import read_settings
from vit_mechinterp.commands.image_data import image_data
from vit_mechinterp.errors import DataError

MODEL = "tests.tiny_models:TIMM_PLAIN.module"


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images in two folders named by their label."""
    for seed in range(8):
        path = tmp_path / "images" / ("cat" if seed % 2 else "dog")
        path.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path / f"{seed}.png")
    return tmp_path / "images"


SMALL = {
    "embedding_matching": ["max_steps=2"],
    "faithfulness": ["heads=[[0, 1], [2, 0]]", "subsets=2", "random_sets=1"],
    "probing": ["folds=2", "controls=1"],
    "attribution_patching": ["sample=2"],
    "edge_attribution": ["sample=2", "receivers=[logits]"],
    "activation_patching": ["sites=[resid_pre]", "window=4"],
    "ablation_sweep": ["parts=[heads]", "methods=[zero]"],
    "cumulative_ablation": ["random_orders=1", "step=4"],
    "edge_patching": ["senders=[embed, blocks.0.mlp_out]", "receivers=[logits]"],
    "path_patching": ["senders=[embed]", "receivers=[logits]"],
    "local_lipschitz": ["power_iterations=1"],
}


@pytest.mark.parametrize("name", [name for name, entry in CIRCUITS.items() if entry.images not in ("objects", "training", "result")])
def test_every_circuit_runs_from_words(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry, out = CIRCUITS[name], tmp_path / "out"
    settings = [s for s in SMALL.get(name, []) if s.split("=")[0] in entry.options]
    if name == "steering":
        from safetensors.torch import save_file

        save_file({"blocks.1.resid_post": torch.ones(24)}, tmp_path / "tensors.safetensors")
        settings = [f"directions={tmp_path}", "alphas=[-1, 2]", "controls=1"]
    if name == "sparse_autoencoder":
        from safetensors.torch import save_file

        held = {"W_enc": torch.randn(24, 30), "W_dec": torch.randn(30, 24)}
        save_file(held, tmp_path / "sae.safetensors")
        settings = [f"dictionary={tmp_path}", "site=blocks.1.resid_post", "top=2"]
    data = [str(folder)]
    if entry.images == "pairs":
        data = [str(folder / "cat" / "1.png"), str(folder / "dog" / "2.png")]
    command = ["circuit", name, "--model", MODEL, "--data", *data, "--out", str(out), "--quiet"]
    for setting in settings:
        command += ["--set", setting]
    assert main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert printed.startswith(result["title"])
    for key in result["summary"]:
        assert f"  {key}: " in printed
    assert f"In {out}: " in printed
    assert "table.csv" in printed
    assert len(pd.read_parquet(out / "table.parquet")) > 0
    page = (out / "index.html").read_text()
    assert result["title"] in page
    assert page.count("data:image/png;base64,") == len(list(out.glob("*.png"))) == len(result["figures"])
    if "folder" in entry.options:
        assert list((out / "finished").glob("**/*.safetensors")), "what is finished is kept"


def test_training_holds_out_a_quarter_or_takes_two_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vmi.stimuli.counterfactuals("shape", n=8, canvas=64, progress=False).save_to_disk(tmp_path / "pairs")
    seen = []

    def das(vit, train, test, *, epochs: int = 20, progress: bool = True):
        seen.append((len(train), len(test), epochs))
        return circuits.CircuitResult("das", pd.DataFrame({"a": [1]}))

    monkeypatch.setattr(sys.modules["vit_mechinterp.circuits.das"], "das", das)
    words = ["circuit", "das", "--model", MODEL, "--out", str(tmp_path / "out"), "--set", "epochs=1", "--quiet", "--data"]
    assert main([*words, str(tmp_path / "pairs")]) == 0
    assert main([*words, str(tmp_path / "pairs"), str(tmp_path / "pairs")]) == 0
    assert seen == [(6, 2, 1), (8, 8, 1)]


def test_the_list_has_every_public_circuit_on_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["circuit", "--list"]) == 0
    printed = capsys.readouterr().out
    public = {
        name for name in circuits.__all__ if name.islower() and "vit" in inspect.signature(getattr(circuits, name)).parameters
    }
    # These take pairs by attribute, or are no circuits.
    others = {"das_by_attribute", "novel_representations", "image_pairs", "patch_association"}
    assert public - set(CIRCUITS) <= others
    for name, entry in CIRCUITS.items():
        assert f"\n{name} " in f"\n{printed}"
        assert next(iter(inspect.signature(entry.function).parameters)) == "vit"


def test_options_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["circuit", "logit_lens", "--options"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("logit_lens: answer=None, directions=None")
    assert "Read every layer's residual stream" in printed


def test_mistakes_are_one_message_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(["circuit", *words]) == 2
        return capsys.readouterr().err

    assert "There is no circuit 'stering'. Close matches: steering" in said("stering")
    assert "attention needs --model; it takes images" in said("attention")
    given = ["--model", "no/model", "--data", "x", "--out", str(tmp_path)]
    assert "has no option 'alpha'. Close matches: alphas" in said("steering", *given, "--set", "alpha=1")
    assert "circuit steering needs directions" in said("steering", *given)
    assert "There is no metric 'prob'" in said("steering", *given, "--set", "metric.name=prob", "--set", "directions=x")
    assert "--set takes KEY=VALUE" in said("attention", *given, "--set", "alpha")


def test_folders_and_datasets(folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    labelled = image_data([str(folder)], pairs=False)
    assert labelled["label"] == [0] * 4 + [1] * 4
    assert labelled.features["label"].names == ["cat", "dog"]
    assert np.array_equal(np.asarray(labelled[0]["image"]), np.asarray(picture(1)))
    plain = image_data([str(folder / "dog")], pairs=True, n=3)
    assert [np.asarray(image).sum() for image in plain["image"]] == [np.asarray(picture(s)).sum() for s in (0, 2, 4)]

    saved = Dataset.from_dict({"img": [picture(s) for s in range(3)], "kind": [1, 0, 1]})
    saved.save_to_disk(tmp_path / "saved")
    assert image_data([str(tmp_path / "saved")], pairs=False, n=2)["kind"] == [1, 0]
    assert "base" in image_data([str(tmp_path / "saved")], pairs=False).column_names
    DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "splits")
    assert len(image_data([str(tmp_path / "splits")], pairs=False, options={"split": "test"})) == 1
    with pytest.raises(DataError, match=r"has the splits train, test; name one: --set data.split=NAME"):
        image_data([str(tmp_path / "splits")], pairs=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no images"):
        image_data([str(tmp_path / "empty")], pairs=False)
    Dataset.from_dict({"kind": [1]}).save_to_disk(tmp_path / "blind")
    with pytest.raises(DataError, match=r"has no column of images. Columns: kind"):
        image_data([str(tmp_path / "blind")], pairs=False)


def test_two_files_are_a_pair_of_one_size(tmp_path: Path) -> None:
    picture(0, (40, 32)).save(tmp_path / "a.png")
    picture(1, (64, 64)).save(tmp_path / "b.png")
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    with pytest.raises(DataError, match=r"a.png has 40 x 32 pixels and .*b.png 64 x 64, .* --set data.fit=true"):
        image_data(files, pairs=True)
    clean, other = image_data(files, pairs=True, options={"fit": True})
    assert clean.size == other.size == (40, 32)
    assert [image.size for image in image_data(files, pairs=False)] == [(40, 32), (64, 64)]
    assert isinstance(image_data(["photographs"], pairs=True), tuple)
    with pytest.raises(DataError, match=r"'nowhere' is no image file or folder here"):
        image_data(["nowhere"], pairs=False)


def test_the_first_few_of_a_labelled_folder_have_every_label(folder: Path) -> None:
    few = image_data([str(folder)], pairs=False, n=3)
    assert few["label"] == [0, 0, 1]
    assert [np.asarray(image).sum() for image in few["image"]] == [np.asarray(picture(s)).sum() for s in (1, 3, 0)]


def test_damaged_images_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = folder / "cat" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:700])
    words = ["circuit", "attention", "--model", MODEL, "--data", str(folder), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "Column 'base': 1 of 8 images cannot be decoded: example" in said
    assert f"({damaged}: " in said
    assert not (tmp_path / "out").exists()


def test_options_of_the_wrong_kind_are_named_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["circuit", "logit_lens", "--model", "no/model", "--data", "x", "--out", "y"]
    assert main([*given, "--set", "layers=three"]) == 2
    assert "circuit logit_lens: layers takes Sequence[int] | Literal['all'], not 'three'" in capsys.readouterr().err
    assert main([*given, "--set", "resamples=few"]) == 2
    assert "resamples takes int, not 'few'" in capsys.readouterr().err
    entry = CIRCUITS["activation_patching"]
    read, data = read_settings(["sites=resid_pre", "layers=[1]", "data.n=3"], "activation_patching", entry)
    assert read == {"sites": ["resid_pre"], "layers": [1]}
    assert data == {"n": 3}


@pytest.mark.parametrize(("word", "wanted"), [("logits", ["logits"]), ("[logits, embed]", ["logits", "embed"])])
def test_a_word_where_several_may_stand_is_one_of_them(word: str, wanted: list[str]) -> None:
    read, _ = read_settings([f"receivers={word}"], "path_patching", CIRCUITS["path_patching"])
    assert read == {"receivers": wanted}


def test_results_become_one_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (2, 10):
        words = ["circuit", "attention", "--model", MODEL, "--data", str(folder), "-n", "2", "--quiet"]
        assert main([*words, "--out", str(tmp_path / "all" / f"run {number}")]) == 0
    capsys.readouterr()
    assert main(["page", str(tmp_path / "page.html"), str(tmp_path / "all"), "--title", "Two runs"]) == 0
    assert capsys.readouterr().out == f"The page: {tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text()
    assert "<h1>Two runs</h1>" in page
    titles = [page.index(f"<h2>Attention (run {number})</h2>") for number in (2, 10)]
    assert titles == sorted(titles)
    figures = list((tmp_path / "all").glob("*/*.png"))
    assert page.count("data:image/png;base64,") == len(figures) > 4
    assert page.count('<a download="attention.csv"') == 2
    assert main(["page", str(tmp_path / "page.html"), str(folder)]) == 2
    assert "holds no result of a circuit, neither itself nor in its folders" in capsys.readouterr().err


def test_a_killed_command_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    """Killed without notice, between two writes: what was written is not computed again."""
    data = [str(folder / "cat" / "1.png"), str(folder / "dog" / "2.png")]
    words = ["circuit", "activation_patching", "--model", MODEL, "--data", *data, "--out", str(tmp_path / "out")]
    words += ["--set", "sites=resid_pre", "--quiet"]
    code = (
        "import os, sys\n"
        "from vit_mechinterp.circuits import cells\n"
        "from vit_mechinterp.cli import main\n"
        "cells.runs_at_once = lambda vit, n: 9\n"
        "execute, calls = cells.execute, []\n"
        "def dies(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: os.kill(os.getpid(), 9)\n"
        "    return execute(*args, **kwargs)\n"
        "cells.execute = dies\n"
        "main(sys.argv[1:])\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, *words], check=False)
    assert killed.returncode == -9
    kept = list((tmp_path / "out" / "finished").glob("*.safetensors"))
    assert len(kept) == 2
    assert not (tmp_path / "out" / "result.json").exists()
    times = [path.stat().st_mtime_ns for path in kept]
    assert main(words) == 0
    assert [path.stat().st_mtime_ns for path in kept] == times
    table = pd.read_parquet(tmp_path / "out" / "table.parquet")
    fresh = circuits.activation_patching(
        vmi.wrap(tiny_models.TIMM_PLAIN.module()), tuple(map(Path, data)), sites=["resid_pre"], progress=False
    ).table
    np.testing.assert_allclose(table["change"], fresh["change"], atol=1e-5)
    assert np.abs(fresh["change"]).max() > 1e-3
