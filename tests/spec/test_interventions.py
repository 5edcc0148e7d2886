"""Interventions: what they accept, what they refuse and with which words, and how others add their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import ValidationError

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec import (
    OPS,
    Ablate,
    AddDirection,
    Capture,
    Column,
    Experiment,
    InjectSubspace,
    Interchange,
    Intervention,
    Run,
    RunSource,
    TensorRef,
    TokenBox,
    TokenColumn,
    register_op,
)

SITE = "blocks.3.resid_post"
HEAD = "blocks.3.attn.z"


def test_selectors_are_read_from_their_document_form() -> None:
    swap = Interchange(site=SITE, source={"run": "other"}, tokens={"column": "edited_tokens"}, source_tokens=[0, "cls"])
    assert swap.tokens == TokenColumn(column="edited_tokens")
    assert swap.source_tokens == (0, "cls") == swap.tokens_read
    assert swap.source == RunSource(run="other")
    assert Interchange(site=SITE, source="s", tokens={"box": "edited_box"}).tokens_read == TokenBox(box="edited_box")
    assert Interchange(site=SITE, source="s", tokens=range(2)).tokens == (0, 1)
    assert Interchange(site=SITE, source="s", tokens=np.int64(4)).tokens == (4,)
    assert Ablate(site=HEAD, heads=2).heads == Ablate(site=HEAD, heads=[np.int64(2)]).heads == (2,)
    assert AddDirection(site=SITE, vector="probe", choose={"column": "shape_1"}).choose == Column(column="shape_1")
    assert Ablate(site="blocks.1.attn.pattern", tokens="cls", keys="patches", heads=(0, 1)).keys == "patches"


def test_tensor_references() -> None:
    assert TensorRef("probe") == TensorRef(name="probe") == AddDirection(site=SITE, vector="probe").vector
    by_file = TensorRef("das.safetensors", "R", "A" * 64)
    assert by_file == TensorRef(file="das.safetensors", key="R", sha256="a" * 64)
    assert TensorRef(Path("das.safetensors"), key="R") == TensorRef("das.safetensors", "R")
    assert str(by_file) == "das.safetensors:R"
    assert TensorRef.model_validate({"file": "das.safetensors", "key": "R"}).file == "das.safetensors"


def test_specs_are_frozen_and_hashable() -> None:
    swap = Interchange(site=SITE, source="s")
    with pytest.raises(ValidationError, match="frozen"):
        swap.site = HEAD  # type: ignore[misc]
    assert len({swap, Interchange(site=SITE, source="s"), swap.at(layer=4)}) == 2


def test_at_moves_the_site_and_leaves_a_given_source_site() -> None:
    follows = Interchange(site=SITE, source="s")
    stays = Interchange(site=SITE, source="s", source_site="blocks.0.resid_pre")
    assert follows.at(layer=7).site == follows.at(layer=7).site_read == "blocks.7.resid_post"
    assert (stays.at(layer=7).site, stays.at(layer=7).site_read) == ("blocks.7.resid_post", "blocks.0.resid_pre")
    assert follows.at(tokens="cls", site="blocks.1.hook_resid_mid").site == "blocks.1.resid_mid"
    with pytest.raises(SpecError, match="has no head axis"):
        follows.at(layer=2, heads=1)
    with pytest.raises(SpecError, match="stands in no block"):
        Ablate(site="logits").at(layer=1)
    with pytest.raises(SpecError, match=r"Unknown field 'token'\. Close matches: tokens"):
        follows.at(token="cls")


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Interchange(site=SITE, soruce="s"), r"Unknown field 'soruce'\. Close matches: source\. Fields of Interchange: op"),
    (lambda: Interchange(site=SITE), r"source: Field required"),
    (lambda: Interchange(site="blocks.*.resid_post", source="s"), "is a pattern, and one site is wanted here"),
    (lambda: Interchange(site=SITE, source={"image": "s"}), "is no source. Write the name of an image column"),
    (lambda: Interchange(site=SITE, source="s", tokens=[]), "An empty list selects no token"),
    (lambda: Interchange(site=SITE, source="s", tokens=["all", 2]), "'all' already means every token"),
    (lambda: Interchange(site=SITE, source="s", tokens=[-1]), "-1 is negative"),
    (lambda: Interchange(site=SITE, source="s", tokens=[True]), "True is not an integer"),
    (lambda: Interchange(site=SITE, source="s", tokens=True), "True is not an integer"),
    (lambda: Interchange(site=SITE, source="s", tokens={"colunm": "x"}), "selects no tokens. Write a name"),
    (lambda: Interchange(site=SITE, source="s", tokens=2.5), "selects no tokens"),
    (lambda: Interchange(site=SITE, source="s", source_site=HEAD), "cannot be paired with"),
    (lambda: Interchange(site=SITE, source="s", source_site="pooled"), "cannot be paired with"),
    (lambda: Interchange(site="pooled", source="s", source_tokens="cls"), "has no token axis, so only tokens='all'"),
    (lambda: Ablate(site="logits", tokens="cls"), "has no token axis, so only tokens='all'"),
    (lambda: Ablate(site=SITE, heads=1), r"has no head axis, so heads=\(1,\) cannot be selected there. Sites with heads"),
    (lambda: Ablate(site=HEAD, heads=[1, 1]), "names a head twice"),
    (lambda: Ablate(site=HEAD, heads=[]), "An empty list selects no head"),
    (lambda: Ablate(site=HEAD, heads=-1), "negative"),
    (lambda: Ablate(site=HEAD, keys="cls"), "only attn.scores and attn.pattern have keys"),
    (lambda: Ablate(site=SITE, mean="m"), 'mean and pool_tokens belong to method="mean"'),
    (lambda: Ablate(site=SITE, method="mean", seed=1), 'seed belongs to method="resample"'),
    (lambda: Ablate(site=SITE, method="meen"), "Input should be 'zero', 'mean' or 'resample'"),
    (lambda: AddDirection(site=SITE, vector="v", alpha=float("nan")), "finite number"),
    (lambda: InjectSubspace(site=SITE, basis="R"), "exactly one of source and vectors; got neither"),
    (lambda: InjectSubspace(site=SITE, basis="R", source="s", vectors="v"), "got both"),
    (lambda: InjectSubspace(site=SITE, basis="R", vectors="v", source_tokens="cls"), "belong to source"),
    (lambda: InjectSubspace(site=SITE, basis="R", source="s", choose={"column": "c"}), "picks a row of vectors"),
    (lambda: TensorRef(), "either a name"),
    (lambda: TensorRef("a.safetensors"), "looks like a file, and a file needs the key"),
    (lambda: TensorRef(name="a", file="b", key="c"), "a name or a file, not both"),
    (lambda: TensorRef("a.safetensors", "k", "12"), "64 hexadecimal digits"),
    (lambda: TensorRef("a", "k", file="b"), "got 'file' twice"),
    (lambda: TensorRef(file="a", kee="k"), r"Unknown field 'kee'\. Close matches: key"),
    (lambda: Capture(site="logits", tokens="cls"), "has no token axis"),
    (lambda: Capture(site=SITE, heads=1), "has no head axis"),
    (lambda: Run(name=""), "at least 1 character"),
    (lambda: Run(name="r", interventions=[{"op": "abalte", "site": SITE}]), r"Unknown op 'abalte'\. Close matches: ablate\. Known: ablate,"),
    (lambda: Run(name="r", interventions=[{"site": SITE}]), "does not say its 'op'. Known: ablate"),
    (lambda: Run(name="r", interventions=["ablate"]), "An intervention is a mapping with an 'op'"),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=range(len(REFUSED)))
def test_malformed_specs_say_what_is_wrong(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_errors_inside_a_run_name_the_path() -> None:
    with pytest.raises(SpecError, match=r"^Run: interventions\.0\.metod: Unknown field 'metod'\. Close matches: method"):
        Run.model_validate({"name": "r", "interventions": [{"op": "ablate", "site": SITE, "metod": "zero"}]})


def test_errors_are_of_the_tree_one_line_per_problem() -> None:
    with pytest.raises(SpecError) as caught:
        Ablate(site="blocks.1.resid_pst", method="zeros")
    first, second = str(caught.value).splitlines()
    assert first.startswith("Ablate: site: ")
    assert "Close matches: blocks.1.resid_post" in first
    assert second == "Ablate: method: Input should be 'zero', 'mean' or 'resample'; got 'zeros'."
    with pytest.raises(SpecError, match=r"^Run: name: Field required$"):
        Run.model_validate_json("{}")
    vector = {"file": "v.safetensors", "key": "v", "sha256": "0"}
    with pytest.raises(SpecError, match=r"^Run: interventions\.0\.vector\.sha256: sha256 is 64 hexadecimal digits"):
        Run(name="r", interventions=[{"op": "add_direction", "site": SITE, "vector": vector}])


def test_an_inline_tensor_is_told_where_to_go() -> None:
    for inline in (np.ones(3), [0.0, 1.0]):
        with pytest.raises(SpecError, match=r"holds no tensors, got a \w+: give a name here.*tensors=\{name: tensor\}"):
            AddDirection(site=SITE, vector=inline)
        with pytest.raises(SpecError, match="give a name here"):
            InjectSubspace(site=SITE, source="s", basis=inline)
    with pytest.raises(SpecError, match="give a name here"):
        TensorRef(np.ones(3))  # type: ignore[call-overload]


def test_captures_are_read_from_strings() -> None:
    run = Run(name="r", capture=["blocks.*.hook_resid_post", "blocks.1.hook_resid_mid", Capture(site=HEAD, heads=0)])
    assert [capture.site for capture in run.capture] == ["blocks.*.hook_resid_post", "blocks.1.resid_mid", HEAD]
    assert Run(name="r", capture="logits").capture == (Capture(site="logits"),)


@pytest.fixture
def scale() -> Any:
    @register_op
    class Scale(Intervention):
        """Multiply by a number."""

        op: Literal["scale"] = "scale"
        factor: float

    yield Scale
    del OPS["scale"]


def test_a_third_party_adds_an_op_with_one_class(scale: Any) -> None:
    run = Run.model_validate({"name": "r", "interventions": [{"op": "scale", "site": SITE, "factor": 2}]})
    assert run.interventions == (scale(site=SITE, factor=2.0),)
    assert Run.model_validate_json(run.model_dump_json()) == run
    assert "factor" in run.model_dump_json()
    assert "Scale" in Experiment.json_schema()["$defs"]


def test_ops_are_registered_once_and_have_to_be(scale: Any) -> None:
    class Other(Intervention):
        op: Literal["scale"] = "scale"

    class Nameless(Intervention):
        pass

    with pytest.raises(SpecError, match="The op 'scale' is already"):
        register_op(Other)
    with pytest.raises(SpecError, match="needs a field such as op"):
        register_op(Nameless)
    with pytest.raises(SpecError, match="is not registered: decorate it with @register_op"):
        Run(name="r", interventions=[Other(site=SITE)])
    assert register_op(scale) is scale


def test_the_json_schema_lists_every_op() -> None:
    schema = Experiment.json_schema()
    items = schema["$defs"]["Run"]["properties"]["interventions"]["items"]
    assert items["discriminator"]["propertyName"] == "op"
    assert set(items["discriminator"]["mapping"]) == set(OPS) >= {"interchange", "add_direction", "inject_subspace", "ablate"}
    assert {entry["$ref"] for entry in items["anyOf"]} == set(items["discriminator"]["mapping"].values())
