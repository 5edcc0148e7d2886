"""Novel representations against forwards made by hand with plain hooks, in trained and in made-up subspaces."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch import Tensor

import vit_mechinterp as vmi
from tests.circuits.test_das import LAYERS, QUICK, D, pairs, tokens_of, vit
from vit_mechinterp.circuits.das import das
from vit_mechinterp.circuits.novel_representations import METHODS, novel_representations
from vit_mechinterp.circuits.novel_vectors import novel_vectors
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.circuits.subspaces import trained_subspaces
from vit_mechinterp.errors import DataError, SpecError

assert vit  # the fixture
N = 24


def with_other(n: int, seed: int, vit: vmi.HookedViT) -> dict[str, Any]:
    """Pairs in which the edited object's partner has a place: the cell below or above it, or beside it."""
    data = pairs(n, seed, vit)
    box = data["edited_box"]
    data["other_box"] = torch.where((box[:, 1:2] >= 16), box - torch.tensor([0, 16, 0, 16]), box + torch.tensor([0, 16, 0, 16]))
    data["other_box"] = data["other_box"].clamp(0, 32)
    low = data["other_box"][:, :2].clamp(max=16)
    data["other_box"] = torch.cat([low, low + 16], dim=1)
    return data


@pytest.fixture(scope="module")
def values(vit: vmi.HookedViT) -> dict[str, Any]:
    return with_other(10, 11, vit)


@pytest.fixture(scope="module")
def test(vit: vmi.HookedViT) -> dict[str, Any]:
    return with_other(N, 12, vit)


def made_up(
    vit: vmi.HookedViT, layers: tuple[int, ...] = (0, 1), open_: int = 6, tied: bool = True
) -> CircuitResult:
    """A result of a search with random rotations and gates that are open at random, untied for four tokens each."""
    draw = torch.Generator().manual_seed(5)
    tensors, rows = {}, []
    for layer in layers:
        tensors[f"rotation_{layer}"] = torch.linalg.qr(torch.randn(*([] if tied else [4]), D, D, generator=draw)).Q
        gates = [
            torch.zeros(D).index_fill(0, torch.randperm(D, generator=draw)[:open_], 1.0) for _ in range(1 if tied else 4)
        ]
        tensors[f"gate_{layer}"] = gates[0] if tied else torch.stack(gates)
        site = f"blocks.{layer}.resid_post"
        rows.append({"attribute": "shape", "control": "none", "seed": 0, "layer": layer, "site": site, "accuracy": 0.5})
    return CircuitResult(
        name="das", table=pd.DataFrame(rows), tensors=tensors, summary={"chance": 0.5},
        provenance={"model": vit.fingerprint(), "model_source": "mine"},
    )  # fmt: skip


def by_hand(
    vit: vmi.HookedViT, data: dict[str, Any], layer: int, rotation: Tensor, gate: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Logits with given rotated vectors ``[example, token, d]`` in both objects, by the published formula."""
    row = torch.arange(len(data["base"]))[:, None]

    def edit(m: Any, a: Any, out: Tensor) -> Tensor:
        for box, vector in (("edited_box", first), ("other_box", second)):
            where = (row, tokens_of(data[box]))
            own, rotations, gates = out[where], rotation.expand(4, -1, -1), gate.expand(4, -1)
            new = []
            for token in range(4):
                b, g = own[:, token] @ rotations[token], gates[token]
                new.append(((1 - g) * b + g * vector[:, token]) @ rotations[token].T)
            out = out.index_put(where, torch.stack(new, dim=1))
        return out

    handle = vit.module.blocks[layer].register_forward_hook(edit)
    with torch.no_grad():
        logits: Tensor = vit.module(data["base"])
    handle.remove()
    return logits


def embeddings(vit: vmi.HookedViT, data: dict[str, Any], layer: int, rotation: Tensor, gate: Tensor) -> Tensor:
    """The published ``E``: gated, rotated activations of the source objects, ``[item, token, d]``."""
    seen: list[Tensor] = []
    handle = vit.module.blocks[layer].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        vit.module(data["source"])
    handle.remove()
    return gate * (seen[0][torch.arange(len(data["source"]))[:, None], tokens_of(data["source_box"])] @ rotation)


def spread(open_vectors: Tensor, gate: Tensor) -> Tensor:
    """Coordinates in the open dimensions as rotated vectors, one for each of four tokens."""
    gate = gate.amax(dim=0) if gate.ndim == 2 else gate  # untied vectors have every dimension that any token opens
    whole = torch.zeros(*open_vectors.shape[:-1], D)
    whole[..., gate > 0] = open_vectors
    return whole if whole.ndim == 3 else whole[:, None].expand(-1, 4, -1)


@pytest.mark.parametrize(("draws", "judged", "tied"), [
    ("example", False, True), ("batch", False, True), ("example", True, True), ("batch", True, True), ("example", False, False),
])  # fmt: skip
def test_the_answers_are_those_of_the_published_formula(
    vit: vmi.HookedViT, values: dict[str, Any], test: dict[str, Any], draws: Any, judged: bool, tied: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module: Any = importlib.import_module("vit_mechinterp.circuits.novel_representations")  # the name is the function

    drawn: dict[str, Tensor] = {}
    original = module._Cell.vectors

    def kept(self: Any, found: Tensor, n: int, seed: int) -> Tensor:
        drawn[f"{self.subspace.layer}, {self.method}"] = original(self, found, n, seed)
        return drawn[f"{self.subspace.layer}, {self.method}"]

    monkeypatch.setattr(module._Cell, "vectors", kept)
    if judged:
        test = {**test, "intermediate_judgement": torch.arange(N) % 2}
    same = (test["intermediate_judgement"] == 0) if judged else test["counterfactual_label"] == 1
    assert 0 < int(same.sum()) < N
    search = made_up(vit, tied=tied)
    result = novel_representations(vit, {"shape": (values, test)}, search, draws=draws, draw_batch=5, progress=False)
    assert len(result.table) == 2 * len(METHODS)
    size = 1 if draws == "example" else 5
    unit = torch.arange(N) // size
    for row in result.table.itertuples():
        rotation, gate = (search.tensors[f"{name}_{row.layer}"] for name in ("rotation", "gate"))
        vectors = spread(drawn[f"{row.layer}, {row.method}"], gate)
        assert len(vectors) == 2 * (1 + int(unit[-1]))
        first, second = vectors[2 * unit], vectors[2 * unit + (~same).long()]
        logits = by_hand(vit, test, row.layer, rotation, gate, first, second)
        hits = logits.argmax(dim=-1) == test["counterfactual_label"]
        assert row.accuracy == pytest.approx(hits.double().mean().item())
        assert row.accuracy_low <= row.accuracy <= row.accuracy_high
        assert (row.rank, row.draws, row.n) == (6, 1 + int(unit[-1]), N)
    clean = (vit(test["base"]).argmax(dim=-1) == test["counterfactual_label"]).double().mean().item()
    assert set(result.table["no_effect"]) == {clean}
    assert (result.table["accuracy"] - clean).abs().max() > 0.05


def test_vectors_are_made_as_published() -> None:
    values = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    found = {name: novel_vectors(name, values, 2000, np.random.default_rng(1)) for name in METHODS}
    one, other = np.random.default_rng(1).integers(7, size=(2, 2000))
    torch.testing.assert_close(found["added"], values[one] + values[other])
    torch.testing.assert_close(found["interpolated"], (values[one] + values[other]) / 2)
    assert found["added"].shape == (2000, 4, 3)
    every = values.reshape(-1, 3)
    torch.testing.assert_close(found["sampled"].mean(dim=0), every.mean(dim=0), rtol=0, atol=0.5)
    torch.testing.assert_close(found["sampled"].std(dim=0), every.std(dim=0), rtol=0.1, atol=0)
    torch.testing.assert_close(found["random"].mean(dim=0), torch.zeros(3), rtol=0, atol=0.1)
    torch.testing.assert_close(found["random"].std(dim=0), torch.ones(3), rtol=0.1, atol=0)
    assert found["random"].shape == (2000, 3)


def test_vectors_come_from_the_gated_coordinates_of_the_source_objects(
    vit: vmi.HookedViT, values: dict[str, Any], test: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = importlib.import_module("vit_mechinterp.circuits.novel_representations")  # the name is the function

    seen: list[Tensor] = []
    original = module.novel_vectors
    monkeypatch.setattr(module, "novel_vectors", lambda *a, **k: (seen.append(a[1]), original(*a, **k))[1])
    search = made_up(vit, (1,))
    novel_representations(vit, {"shape": (values, test)}, search, methods=["added"], progress=False)
    gate = search.tensors["gate_1"]
    expected = embeddings(vit, values, 1, search.tensors["rotation_1"], gate)
    torch.testing.assert_close(spread(seen[0], gate), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.1


def test_untied_vectors_are_made_of_each_tokens_own_coordinates(
    vit: vmi.HookedViT, values: dict[str, Any], test: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = importlib.import_module("vit_mechinterp.circuits.novel_representations")  # the name is the function
    seen: list[Tensor] = []
    original = module.novel_vectors
    monkeypatch.setattr(module, "novel_vectors", lambda *a, **k: (seen.append(a[1]), original(*a, **k))[1])
    search = made_up(vit, (1,), tied=False)
    novel_representations(vit, {"shape": (values, test)}, search, methods=["added"], progress=False)
    gate, rotation = search.tensors["gate_1"], search.tensors["rotation_1"]
    for token in range(4):
        expected = embeddings(vit, values, 1, rotation[token], gate[token])[:, token]
        found = gate[token] * spread(seen[0], gate)[:, token]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert expected.abs().max() > 0.1
    values_ = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [5.0]]) + 2
    sampled = novel_vectors("sampled", values_, 2000, np.random.default_rng(1), tied=False)
    torch.testing.assert_close(sampled.std(dim=0), values_.std(dim=0), rtol=0.1, atol=0)
    assert abs(float(torch.corrcoef(sampled[:, :, 0].T)[0, 1])) < 0.1  # every token has noise of its own
    cells = {**values, **{f"{name}_box": test[f"{name}_box"][:10] - torch.tensor([0, 0, 8, 0]) for name in ("source", "edited", "other")}}
    with pytest.raises(DataError, match=r"each of 4 tokens a subspace of its own \(tied=False\), and objects here have 2"):
        novel_representations(vit, {"shape": (cells, cells)}, search, progress=False)


def test_the_whole_residual_is_a_space_without_a_complement(
    vit: vmi.HookedViT, values: dict[str, Any], test: dict[str, Any]
) -> None:
    how: dict[str, Any] = {"whole_residual": True, "methods": ["interpolated"], "layers": [0], "progress": False}
    result = novel_representations(vit, {"shape": (values, test)}, made_up(vit), **how)
    assert result.table["space"].tolist() == ["subspace", "whole residual"]
    assert result.table["rank"].tolist() == [6, D]
    whole = made_up(vit)
    whole.tensors["rotation_0"].copy_(torch.eye(D))
    whole.tensors["gate_0"].fill_(1.0)
    full = novel_representations(vit, {"shape": (values, test)}, whole, **{**how, "whole_residual": False})
    both = novel_representations(vit, {"shape": (values, test)}, whole, **how).table["accuracy"]
    assert full.table["accuracy"].iloc[0] == both.iloc[0]
    panels = [axes.get_title(loc="left") for axes in result.figures()["novel_representations"].axes]
    assert panels == ["shape", "shape, whole residual"]
    closed = made_up(vit, open_=0)
    nothing = novel_representations(vit, {"shape": (values, test)}, closed, methods=["random"], progress=False).table
    assert nothing["accuracy"].tolist() == nothing["no_effect"].tolist()


def test_seeds_of_draws_are_averaged_and_repeat(vit: vmi.HookedViT, values: dict[str, Any], test: dict[str, Any]) -> None:
    how: dict[str, Any] = {"methods": ["random"], "layers": [0], "progress": False}
    data = {"shape": (values, test)}
    search = made_up(vit)
    alone = [novel_representations(vit, data, search, seeds=[seed], **how).table["accuracy"].iloc[0] for seed in range(3)]
    together = novel_representations(vit, data, search, seeds=[0, 1, 2], **how).table.iloc[0]
    assert together["accuracy"] == pytest.approx(np.mean(alone))
    assert len(set(alone)) > 1
    assert together["draws"] == 3 * N
    by_batch = novel_representations(vit, data, search, seeds=[0, 1], draws="batch", draw_batch=8, **how).table.iloc[0]
    assert by_batch["draws"] == 2 * 3


def test_trained_subspaces_are_taken_from_a_result_or_its_folder(
    vit: vmi.HookedViT, values: dict[str, Any], test: dict[str, Any], tmp_path: Path
) -> None:
    search = das(vit, values, test, attribute="shape", seeds=(3, 5), layers=[0], **QUICK)
    places = trained_subspaces(search, "shape")
    assert [(one.seed, one.layer, one.site) for one in places] == [(3, 0, "blocks.0.resid_post"), (5, 0, "blocks.0.resid_post")]
    assert torch.equal(places[1].rotation, search.tensors["seed_5.rotation_0"])
    assert places[1].basis.shape == (D, int(search.tensors["seed_5.gate_0"].sum()))
    data = {"shape": (values, Dataset.from_dict({k: v.tolist() for k, v in test.items()}).with_format("torch"))}
    found = novel_representations(vit, data, search.save(tmp_path / "das"), progress=False)
    direct = novel_representations(vit, {"shape": (values, test)}, search, progress=False)
    assert found.table.equals(direct.table)
    assert found.table["seed"].tolist() == [3] * 4 + [5] * 4
    assert "Bands are ranges over the seeds of the search." in found.captions["novel_representations"]
    assert (found.save(tmp_path / "novel") / "novel_representations.pdf").is_file()


def test_what_does_not_fit_is_said_before_any_work(
    vit: vmi.HookedViT, values: dict[str, Any], test: dict[str, Any], tmp_path: Path
) -> None:
    data = {"shape": (values, test)}
    search = made_up(vit)
    runs: list[int] = []
    vit.sites()
    count = vit.module.blocks[0].register_forward_hook(lambda m, a, out: runs.append(len(out)))
    other = replace(search, provenance={"model": "0123456789abcdef", "model_source": "runs/another"})
    with pytest.raises(DataError, match=r"another model, runs/another \(fingerprint 0123456789ab\), not on VisionTransformer"):
        novel_representations(vit, data, other)
    with pytest.raises(DataError, match="is one of 'steering'; subspaces come from a result of 'das'"):
        novel_representations(vit, data, replace(search, name="steering"))
    with pytest.raises(DataError, match="is not the folder of a circuit result"):
        novel_representations(vit, data, tmp_path)
    with pytest.raises(SpecError, match=r"attribute 'shapes' was searched\. Close matches: shape\. Searched: shape\."):
        novel_representations(vit, {"shapes": (values, test)}, search)
    with pytest.raises(SpecError, match=r"no subspace for shape was searched in layer 2\. Searched: 0, 1\."):
        novel_representations(vit, data, search, layers=[1, 2])
    with pytest.raises(SpecError, match=r"no method 'add'\. .*Methods: added, interpolated, sampled, random"):
        novel_representations(vit, data, search, methods=["add"])  # type: ignore[list-item]
    with pytest.raises(SpecError, match="draws='batches' is not known"):
        novel_representations(vit, data, search, draws="batches")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"seeds=\[\]: name at least one"):
        novel_representations(vit, data, search, seeds=[])
    with pytest.raises(SpecError, match=r"nothing to do: give at least one attribute with \(validation pairs, held-out pairs\)"):
        novel_representations(vit, {}, search)
    with pytest.raises(SpecError, match=r"'shape' needs two datasets, \(validation pairs, held-out pairs\), not dict"):
        novel_representations(vit, {"shape": test}, search)  # type: ignore[dict-item]
    with pytest.raises(SpecError, match=r"takes data by attribute, .*, not list"):
        novel_representations(vit, [(values, test)], search)  # type: ignore[arg-type]
    assert not runs
    for column, one in (("base", test), ("source", values)):
        without = {k: v for k, v in one.items() if k != column}
        pair = (values, without) if column == "base" else (without, test)
        with pytest.raises(DataError, match=f"novel_representations: the data has no column '{column}'"):
            novel_representations(vit, {"shape": pair}, search)
    with pytest.raises(DataError, match="has no column 'other_box'"):
        novel_representations(vit, {"shape": (values, {k: v for k, v in test.items() if k != "other_box"})}, search)
    narrow = {**test, "other_box": test["other_box"] - torch.tensor([0, 0, 8, 0])}
    with pytest.raises(DataError, match="objects have 2, 4 tokens"):
        novel_representations(vit, {"shape": (values, narrow)}, search)
    with pytest.raises(DataError, match="column 'relation': 2 is no relation"):
        novel_representations(vit, {"shape": (values, {**test, "relation": torch.arange(N) % 3})}, search, judgement="relation")
    assert max(runs) == 1  # a blank image tells how many classes there are
    count.remove()
    assert LAYERS == 3
