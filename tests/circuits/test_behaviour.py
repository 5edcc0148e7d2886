"""Accuracy by kind of image, against a native forward."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import vit_mechinterp as vmi
from vit_mechinterp.circuits.behaviour import behaviour
from vit_mechinterp.errors import DataError, SpecError

module: Any = importlib.import_module("vit_mechinterp.circuits.behaviour")  # the name is the function


def model(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    module = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=2
    ).eval()
    with torch.no_grad():
        module.head.weight.normal_()
    return module


DATA = {
    "base": torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    "label": [i % 2 for i in range(20)],
    "kind": ["none" if i % 2 else "shape" for i in range(20)],
}


def test_accuracies_are_those_of_native_forwards() -> None:
    modules = {"a": model(0), "b": model(1)}
    result = behaviour(
        {k: vmi.wrap(m) for k, m in modules.items()}, DATA, kinds="kind", kind_names={"none": "same"}
    )
    table = result.table.set_index(["model", "kind"])
    found = []
    for name, module in modules.items():
        with torch.no_grad():
            hits = module(DATA["base"]).argmax(1) == torch.tensor(DATA["label"])
        assert table.loc[(name, "all images"), "accuracy"] == hits.double().mean().item()
        assert table.loc[(name, "same"), "accuracy"] == hits[1::2].double().mean().item()
        assert table.loc[(name, "shape"), "accuracy"] == hits[0::2].double().mean().item()
        assert result.summary[f"accuracy, {name}"] == hits.double().mean().item()
        found.append(hits.double().mean().item())
    assert table["n"].tolist() == [20, 10, 10] * 2
    assert (table["accuracy_low"] <= table["accuracy"]).all()
    assert (table["accuracy_high"] >= table["accuracy"]).all()
    assert len(set(result.table["accuracy"])) > 2
    assert len(result.provenance["model"]) == 2
    assert list(result.figures()) == ["accuracy"] == list(result.captions)


def test_without_kinds_there_is_one_row_a_model() -> None:
    result = behaviour({"a": vmi.wrap(model(0))}, DATA)
    assert result.table["kind"].tolist() == ["all images"]
    with pytest.raises(DataError, match=r"behaviour: the data has no column 'kinds'\. Close matches: kind"):
        behaviour({"a": vmi.wrap(model(0))}, DATA, kinds="kinds")
    with pytest.raises(SpecError, match="at least one model"):
        behaviour({}, DATA)


def test_what_does_not_fit_is_named_before_any_model_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "execute", lambda *arguments, **options: pytest.fail("a model was asked"))
    one, other = vmi.wrap(model(0)), vmi.wrap(model(1))
    with pytest.raises(DataError, match="column 'label', example 3: 2 is no class of a, which has classes 0 to 1"):
        behaviour({"a": one}, {**DATA, "label": [0, 1, 0, 2] + [0] * 16})
    with pytest.raises(DataError, match="behaviour: the data has no column 'image'"):
        behaviour({"a": one}, DATA, base="image")
    tokens = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=0, global_pool="")
    with pytest.raises(SpecError, match=r"behaviour: b gives .* of shape \(17, 24\), not one logit per class"):
        behaviour({"a": other, "b": vmi.wrap(tokens.eval())}, DATA)
