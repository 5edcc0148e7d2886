"""Readouts: what they accept, what they refuse and with which words, and how an experiment's document has one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec import Column, CrossEntropy, Experiment, Run, SelectedLogits


def experiment(readout: Any) -> Experiment:
    return Experiment(runs=[Run(name="clean")], readout=readout)


def test_classes_are_numbers_or_columns() -> None:
    column = Column(column="label")
    assert CrossEntropy(answer="label").answer == CrossEntropy(answer={"column": "label"}).answer == column
    assert CrossEntropy(answer=column) == CrossEntropy(answer="label") != CrossEntropy(answer=3)
    assert CrossEntropy(answer=np.int64(3)).answer == 3
    assert SelectedLogits(classes=3).classes == (3,)
    assert SelectedLogits(classes=range(2)).classes == (0, 1)
    assert SelectedLogits(classes="label").classes == (column,)
    assert SelectedLogits(classes=[4, "label", {"column": "other"}]).classes == (4, column, Column(column="other"))
    with pytest.raises(ValidationError, match="frozen"):
        CrossEntropy(answer=3).answer = 4


def test_names_of_what_is_kept() -> None:
    assert CrossEntropy(answer="label").names == ("cross_entropy",)
    several = SelectedLogits(classes=[4, "label", "other"])
    assert several.names == ("logit_4", "logit_label", "logit_other")
    assert several.columns == {"label", "other"}
    assert CrossEntropy(answer=4).columns == set()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CrossEntropy(), "CrossEntropy: answer: Field required"),
        (lambda: CrossEntropy(answer=-1), "CrossEntropy: answer: -1 is negative"),
        (lambda: CrossEntropy(answer=True), "True is not an integer"),
        (lambda: CrossEntropy(answer=1.5), r"1\.5 is no class\. Write its number, or the name of a column of the data"),
        (lambda: CrossEntropy(answer=[0, 1]), r"\[0, 1\] is no class"),
        (lambda: CrossEntropy(answer=np.arange(3)), r"array\(\[0, 1, 2\]\) is no class"),
        (lambda: CrossEntropy(answer=""), r"answer\.column: String should have at least 1 character"),
        (lambda: CrossEntropy(answer={"colunm": "label"}), "is no class"),
        (lambda: CrossEntropy(label="label"), "label: Unknown field 'label'. Fields of CrossEntropy: op, answer"),
        (lambda: SelectedLogits(classes=[]), "An empty list selects no class; leave readout out to keep the logits of all"),
        (lambda: SelectedLogits(classes=[0, 2, 0]), "classes names 0 twice"),
        (lambda: SelectedLogits(classes=[3, "3"]), "classes names 3 twice"),
        (lambda: experiment("cross_entropy"), r"readout: A readout is a mapping with an 'op' \(cross_entropy, selected_logits\)"),
        (lambda: experiment({"answer": 3}), "readout: This readout does not say its 'op'. Known: cross_entropy, selected_logits."),
        (lambda: experiment({"op": "cross_entrpy", "answer": 3}), "Unknown op 'cross_entrpy'. Close matches: cross_entropy."),
        (lambda: experiment({"op": "cross_entropy", "answr": 3}), "readout.answr: Unknown field 'answr'. Close matches: answer."),
        (lambda: experiment({"op": "selected_logits", "classes": [1.5]}), r"readout\.classes: 1\.5 is no class"),
    ],
)  # fmt: skip
def test_malformed_readouts_say_what_is_wrong(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        make()


@pytest.mark.parametrize(
    ("readout", "document"),
    [
        (CrossEntropy(answer="label"), {"op": "cross_entropy", "answer": {"column": "label"}}),
        (CrossEntropy(answer=3), {"op": "cross_entropy", "answer": 3}),
        (SelectedLogits(classes=[3, "label"]), {"op": "selected_logits", "classes": [3, {"column": "label"}]}),
    ],
)
def test_documents_of_experiments_have_it(readout: Any, document: dict[str, Any], tmp_path: Path) -> None:
    written = experiment(readout)
    assert json.loads(written.model_dump_json(exclude_defaults=True))["readout"] == document
    written.to_yaml(tmp_path / "e.yaml")
    again = Experiment.from_yaml(tmp_path / "e.yaml")
    assert again.readout == readout == experiment(document).readout
    assert again == written != experiment(None)


def test_a_string_is_a_column_in_documents_too() -> None:
    assert experiment({"op": "cross_entropy", "answer": "label"}).readout == CrossEntropy(answer="label")
    short = experiment({"op": "selected_logits", "classes": ["label", 2]})
    assert short.readout == SelectedLogits(classes=["label", 2])


def test_the_json_schema_lists_every_readout() -> None:
    schema = Experiment.json_schema()
    readout, nothing = schema["properties"]["readout"]["anyOf"]
    assert nothing == {"type": "null"}
    assert readout["discriminator"]["propertyName"] == "op"
    assert set(readout["discriminator"]["mapping"]) == {"cross_entropy", "selected_logits"}
    assert {entry["$ref"] for entry in readout["oneOf"]} == set(readout["discriminator"]["mapping"].values())
    assert schema["$defs"]["CrossEntropy"]["properties"]["answer"]["anyOf"][:2] == [{"type": "integer"}, {"type": "string"}]
