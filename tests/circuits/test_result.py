"""A circuit's result survives its folder, and says where its numbers come from."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vit_mechinterp.circuits.result import CircuitResult, package_versions, provenance
from vit_mechinterp.errors import DataError


def draw(result: CircuitResult):
    from vit_mechinterp.figures import lines_by_layer

    return {"line": lines_by_layer({"effect": list(result.table["effect"])})}


def example(**changes) -> CircuitResult:
    table = pd.DataFrame({"layer": [0, 1], "tokens": ["edited", "all"], "effect": [0.1 + 0.2, 1e-17]})
    fields = {
        "name": "interchange_sweep",
        "table": table,
        "provenance": provenance({"seed": 3}),
        "summary": {"best": 0.9, "at": "layer 1", "runs": 4},
        "description": "What was swapped.",
        "captions": {"line": "Effect by layer."},
        "draw": draw,
        "tensors": {"rotation": torch.eye(3).T},
    }
    return CircuitResult(**{**fields, **changes})


def test_save_and_load_keep_every_bit(tmp_path) -> None:
    result = example()
    folder = result.save(tmp_path / "deep" / "sweep")

    loaded = CircuitResult.load(folder, draw=draw)

    pd.testing.assert_frame_equal(loaded.table, result.table, check_exact=True)
    assert loaded.provenance == result.provenance
    assert loaded.summary == result.summary
    assert (loaded.name, loaded.title, loaded.description, loaded.captions) == (
        "interchange_sweep",
        "Interchange sweep",
        "What was swapped.",
        {"line": "Effect by layer."},
    )
    assert torch.equal(loaded.tensors["rotation"], torch.eye(3))
    assert list(loaded.figures()) == ["line"]


def test_the_folder_holds_table_figure_summary_and_provenance(tmp_path) -> None:
    result = example()
    result.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "table.parquet",
        "table.csv",
        "result.json",
        "provenance.json",
        "tensors.safetensors",
        "line.png",
        "line.pdf",
    }
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv"), result.table, check_exact=True)
    assert json.loads((tmp_path / "provenance.json").read_text())["seed"] == 3
    assert Image.open(tmp_path / "line.png").size[0] > 500
    assert (tmp_path / "line.pdf").read_bytes().startswith(b"%PDF")


def test_saving_twice_gives_equal_files(tmp_path) -> None:
    first, second = example().save(tmp_path / "a"), example().save(tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_a_result_in_the_place_of_another_has_nothing_of_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    example().save(tmp_path)
    example(name="attention", tensors={}).save(tmp_path)
    assert CircuitResult.load(tmp_path).name == "attention"
    assert CircuitResult.load(tmp_path).tensors == {}

    def stopped(self: CircuitResult) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(CircuitResult, "figures", stopped)
    with pytest.raises(KeyboardInterrupt):
        example(tensors={"rotation": torch.zeros(3, 3)}).save(tmp_path)
    with pytest.raises(DataError, match=r"is not the folder of a circuit result: it has no result\.json"):
        CircuitResult.load(tmp_path)


def test_values_of_numpy_and_nan_become_plain_json(tmp_path) -> None:
    summary = {"best": np.float32(0.5), "count": np.int64(3), "none": float("nan")}
    example(summary=summary, tensors={}).save(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["summary"] == {
        "best": 0.5,
        "count": 3,
        "none": None,
    }
    assert not (tmp_path / "tensors.safetensors").exists()


def test_a_circuit_without_figures_has_none(tmp_path) -> None:
    result = example(draw=None)
    assert result.figures() == {}
    assert not list(result.save(tmp_path).glob("*.png"))


def test_provenance_merges_its_sources() -> None:
    record = provenance(
        {"spec_digest": "a", "data_fingerprint": "d", "chunks": (2, 2)},
        {"spec_digest": "b", "data_fingerprint": "d"},
        model_fingerprint="m",
        seed=None,
    )
    assert record.pop("versions") == package_versions()
    assert record == {
        "spec_digest": ["a", "b"],
        "data_fingerprint": "d",
        "chunks": [2, 2],
        "model_fingerprint": "m",
    }


def test_versions_name_python_and_torch_but_no_platform() -> None:
    versions = package_versions()
    assert versions["torch"].startswith(torch.__version__.split("+")[0])
    assert versions["python"].count(".") == 2
    assert "linux" not in json.dumps(versions).lower()


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "a b"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="cannot name a circuit"):
        example(name=name)
    with pytest.raises(DataError, match="cannot name a figure"):
        example(draw=lambda result: {name: None}).figures()


def test_loading_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(DataError, match=r"is not the folder of a circuit result: it has no result\.json"):
        CircuitResult.load(tmp_path)
    folder = example().save(tmp_path / "whole")
    (folder / "table.parquet").write_bytes(b"PAR1 truncated")
    with pytest.raises(DataError, match="does not hold a readable circuit result"):
        CircuitResult.load(folder)
    (folder / "result.json").write_text("{")
    with pytest.raises(DataError, match=r"result\.json is not valid JSON"):
        CircuitResult.load(folder)
