"""Experiments as documents: written, read, expanded, and refused with file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec import DataSource, Experiment, Run, TensorRef

DOCUMENT = """\
model: vmi/discrimination-disentangled
description: swap the edited object at every layer
data: {stimuli: counterfactuals, options: {n: 8, seed: 1}}
tensors:
  probe: {file: probes.safetensors, key: color}
batch_size: 16
runs:
- {name: clean, capture: [blocks.*.resid_post]}
- name: layer{layer}
  interventions:
  - {op: interchange, site: blocks.0.resid_post, tokens: {column: edited_tokens}, source: source}
  - {op: add_direction, site: blocks.0.resid_mid, vector: probe, alpha: 2.5}
  over: {layer: all}
"""


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(DOCUMENT)
    return path


def test_a_document_becomes_runs(document: Path) -> None:
    experiment = Experiment.from_yaml(document)
    assert experiment.data == DataSource(stimuli="counterfactuals", options={"n": 8, "seed": 1})
    assert experiment.tensors == {"probe": TensorRef("probes.safetensors", "color")}
    runs = experiment.expand(6)
    assert [run.name for run in runs] == ["clean", *(f"layer{layer}" for layer in range(6))]
    assert [entry.site for entry in runs[6].interventions] == ["blocks.5.resid_post", "blocks.5.resid_mid"]


def test_paths_are_relative_to_the_document_and_stay_as_written(document: Path, tmp_path: Path) -> None:
    experiment = Experiment.from_yaml(document)
    assert experiment.folder == tmp_path.resolve()
    assert experiment.resolve("probes.safetensors") == tmp_path.resolve() / "probes.safetensors"
    assert experiment.resolve("/a/b.safetensors") == Path("/a/b.safetensors")
    assert experiment.tensors["probe"].file == "probes.safetensors"
    in_python = Experiment.model_validate(experiment.model_dump())
    assert in_python.folder is None
    assert in_python.resolve("x") == Path("x")
    assert in_python == experiment


def changed(document: Path, old: str, new: str) -> str:
    text = document.read_text()
    assert old in text
    document.write_text(text.replace(old, new))
    with pytest.raises(SpecError) as caught:
        Experiment.from_yaml(document).expand(6)
    return str(caught.value).replace(str(document), "FILE")


def test_unknown_keys_name_file_path_and_close_matches(document: Path) -> None:
    assert changed(document, "alpha:", "alhpa:").startswith(
        "FILE: runs.1.interventions.1.alhpa: Unknown field 'alhpa'. Close matches: alpha. Fields of AddDirection: op, site,"
    )


def test_every_problem_is_a_line(document: Path) -> None:
    changed(document, "name: clean,", "name: '', bas: x,")
    message = changed(document, "op: interchange", "op: interchnage")
    assert "FILE: runs.0.bas: Unknown field 'bas'. Close matches: base." in message
    assert "\nFILE: runs.1.interventions.0: Unknown op 'interchnage'. Close matches: interchange." in message


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("model:", "modle:", "FILE: modle: Unknown field 'modle'. Close matches: model."),
        ("site: blocks.0.resid_mid", "site: blocks.0.resid", "FILE: runs.1.interventions.1.site: Unknown site"),
        ("batch_size: 16", "batch_size: 0", "FILE: batch_size: batch_size is 'auto' or a positive integer, got 0."),
        ("batch_size: 16", "batch_size: big", "got 'big'"),
        ("{stimuli: counterfactuals,", "{", "FILE: data: data takes exactly one of 'saved' (a folder) and 'stimuli'"),
        ("{stimuli: counterfactuals,", "{saved: folder,", "a saved dataset takes none, got ['n', 'seed']"),
        ("{file: probes.safetensors, key: color}", "probe2", "FILE: tensors.probe must name a file and a key"),
        ("name: clean", "name: layer3", "Two runs of the experiment are called 'layer3'"),
        ("- {name: clean, capture: [blocks.*.resid_post]}", "- clean", "FILE: runs.0: A run is a mapping with a 'name'"),
        ("batch_size: 16", "model: other", "FILE, line 6, column 1: not valid YAML: the key 'model' is written twice."),
        ("batch_size: 16", "batch_size: [16", "FILE, line 7, column"),
        ("batch_size: 16", "batch_size: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine a constructor"),
    ],
)
def test_malformed_documents_say_what_and_where(document: Path, old: str, new: str, text: str) -> None:
    assert text in changed(document, old, new)


def test_files_that_are_no_experiment(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"Cannot read the document '.*none\.yaml': No such file"):
        Experiment.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(SpecError, match="Experiment is a mapping of model, data, runs"):
        Experiment.from_yaml(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("runs: []\n")
    with pytest.raises(SpecError, match="The experiment has no runs"):
        Experiment.from_yaml(tmp_path / "empty.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="Cannot read the document"):
        Experiment.from_yaml(tmp_path / "bytes.yaml")
    (tmp_path / "broken.json").write_text('{"runs": [')
    with pytest.raises(SpecError, match="line 1, column 11: not valid JSON"):
        Experiment.from_json(tmp_path / "broken.json")


def test_defaults_are_left_out_of_yaml(tmp_path: Path) -> None:
    assert Experiment(runs=[Run(name="clean")]).to_yaml(tmp_path / "e.yaml") == "runs:\n- {name: clean}\n"
    assert (tmp_path / "e.yaml").read_text() == "runs:\n- {name: clean}\n"


def test_the_digest_covers_everything(document: Path) -> None:
    experiment = Experiment.from_yaml(document)
    for change in ({"model": None}, {"batch_size": 8}, {"description": ""}, {"tensors": {}}, {"data": None}):
        assert experiment.model_copy(update=change).digest != experiment.digest
