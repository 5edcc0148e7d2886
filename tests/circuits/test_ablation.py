"""Ablations against forwards written by hand: every part, every method, every set of heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import vit_mechinterp as vmi
from tests.oracles import by_hand
from tests.tiny_models import HF_DINOV2, HF_VIT, N_LAYERS, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS
from vit_mechinterp.circuits.ablation import ablation_sweep
from vit_mechinterp.circuits.activation_patching import activation_patching
from vit_mechinterp.circuits.cumulative_ablation import cumulative_ablation
from vit_mechinterp.circuits.faithfulness import faithfulness
from vit_mechinterp.circuits.steering import steering
from vit_mechinterp.errors import DataError, SpecError

N, SEED = 4, 5


def metric(outputs: torch.Tensor) -> torch.Tensor:
    return outputs[:, 0] - 0.2 * outputs[:, 1] ** 2


def clean_values(module, images) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        by_hand(module, images, lambda site, value: values.setdefault(site, value))
    return values


def replacement(values: torch.Tensor, method: str) -> torch.Tensor:
    if method == "zero":
        return torch.zeros_like(values)
    if method == "mean":
        return values.mean(0, keepdim=True).expand_as(values)
    return values[np.random.default_rng(SEED).permutation(len(values))]


def without(module, images, clean, method: str, places: dict) -> torch.Tensor:
    """The metric with some index of some sites written over; ``places`` maps a site to an index behind the batch."""

    def touch(site, value):
        for target, index in places.items():
            if site == target:
                value = value.clone()
                where = (slice(None), *index)
                value[where] = replacement(clean[site], method)[where]
        return value

    with torch.no_grad():
        return metric(by_hand(module, images, touch)).double()


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED, HF_VIT, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_every_part_is_the_hand_made_ablation(tiny) -> None:
    module, images = tiny.module(), tiny.images(N, seed=1)
    clean = clean_values(module, images)
    base = metric(clean["logits"]).double()
    data = {"base": images, "corner": [[0, 1], [2, 3], [4, 5], [6, 7]]}
    neurons = {0: [0, 3], 2: [5]}
    result = ablation_sweep(
        vmi.wrap(module), data, neurons=neurons, token_sets={"corner": {"column": "corner"}}, metric=metric, seed=SEED
    )
    table, first = result.table, len(tiny.prefix)
    names = [*dict.fromkeys(tiny.prefix), "patches", "corner"]
    parts = N_LAYERS * (tiny.n_heads + 2 + len(names)) + 3
    assert len(table) == 3 * parts
    for row in table.to_dict("records"):
        site = f"blocks.{row['layer']}.{row['site']}"
        everything = slice(None)
        if row["part"] == "heads":
            index = (everything, row["head"])
        elif row["part"] == "neurons":
            index = (everything, row["neuron"])
        elif row["part"] == "tokens" and row["tokens"] != "corner":
            kept = range(first, tiny.n_tokens) if row["tokens"] == "patches" else [i for i, n in enumerate(tiny.prefix) if n == row["tokens"]]
            index = (list(kept),)
        else:
            index = (everything,)
        if row["tokens"] == "corner":
            wanted = torch.cat([
                one_corner(module, images, clean, row["method"], site, [first + p for p in data["corner"][i]], i) for i in range(N)
            ])  # fmt: skip
        else:
            wanted = without(module, images, clean, row["method"], {site: index})
        assert row["value"] == pytest.approx(float(wanted.mean()), abs=3e-5), (row["method"], row["part"], site)
        assert row["change"] == pytest.approx(float((wanted - base).mean()), abs=3e-5)
        assert row["relative"] == pytest.approx(row["change"] / abs(float(base.mean())), rel=1e-3, abs=1e-5)
    assert float((table["change"].abs() > 1e-3).mean()) > 0.8
    assert set(result.figures()) == set(result.captions)


def one_corner(module, images, clean, method, site, tokens, example) -> torch.Tensor:
    """The number of one example, its own tokens ablated in all."""
    return without(module, images, clean, method, {site: (tokens,)})[example : example + 1]


def test_one_image_can_only_be_set_to_zero() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    result = ablation_sweep(vit, TIMM_PLAIN.images(1), metric=metric)
    assert set(result.table["method"]) == {"zero"}
    assert set(result.provenance["left_out"]) == {"mean", "resample"}
    assert "give more images" in result.description
    with pytest.raises(DataError, match="With one image nothing can be ablated by mean or resample"):
        ablation_sweep(vit, TIMM_PLAIN.images(1), methods=("mean", "resample"))
    with pytest.raises(DataError, match="With one image nothing can be ablated by mean"):
        cumulative_ablation(vit, TIMM_PLAIN.images(1))


def sets_of_heads(module, images, clean, heads, method) -> torch.Tensor:
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    places = {f"blocks.{layer}.attn.z": (slice(None), own) for layer, own in by_layer.items()}
    return without(module, images, clean, method, places)


@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
def test_every_point_of_the_curves(method) -> None:
    tiny = TIMM_REGISTERS
    module, images = tiny.module(), tiny.images(N, seed=1)
    clean = clean_values(module, images)
    every = [(layer, head) for layer in range(N_LAYERS) for head in range(tiny.n_heads)]
    result = cumulative_ablation(vmi.wrap(module), images, method=method, metric=metric, seed=SEED)
    alone = {head: float(sets_of_heads(module, images, clean, [head], method).mean()) for head in every}
    order = sorted(every, key=lambda head: alone[head])
    assert [tuple(head) for head in result.provenance["order"]] == order
    table = result.table
    assert set(table["order"]) == {"most important first", "least important first", "random order 1", "random order 2", "random order 3"}
    for name, own in table.groupby("order", sort=False):
        assert own["ablated"].tolist() == list(range(len(every) + 1))
        heads = [tuple(map(int, text.replace("layer ", "").split(", head "))) for text in own["last"].iloc[1:]]
        assert sorted(heads) == every
        if not name.startswith("random"):
            assert heads == (order if name.startswith("most") else order[::-1])
        for count, value in zip(own["ablated"], own["value"], strict=True):
            wanted = sets_of_heads(module, images, clean, heads[:count], method)
            assert value == pytest.approx(float(wanted.mean()), abs=3e-5)
    assert table["value"].nunique() > 20
    assert (table["value_low"] <= table["value"] + 1e-9).all()
    assert set(result.figures()) == set(result.captions) == {"curves"}


def test_an_order_of_ones_own_and_larger_steps() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    order = [(2, 0), (0, 1), (1, 2)]
    table = cumulative_ablation(vit, TIMM_PLAIN.images(3), order=order, step=2, random_orders=0, metric=metric).table
    assert table["ablated"].tolist() == [0, 2, 3] * 2
    assert table["last"].tolist() == ["", "layer 0, head 1", "layer 1, head 2", "", "layer 0, head 1", "layer 2, head 0"]


@pytest.mark.parametrize("tiny", [TIMM_POOLED, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_faithfulness_is_the_formula(tiny) -> None:
    module, images = tiny.module(), tiny.images(N, seed=1)
    clean = clean_values(module, images)
    every = [(layer, head) for layer in range(N_LAYERS) for head in range(tiny.n_heads)]
    circuit = [(0, 0), (1, 1), (2, 0)]
    result = faithfulness(vmi.wrap(module), images, circuit, method="mean", metric=lambda outputs: outputs[:, 0] * 3 + 5, subsets=4, random_sets=3)
    whole = clean["logits"][:, 0].double() * 3 + 5

    def left(heads) -> torch.Tensor:
        gone = [head for head in every if head not in heads]
        by_layer: dict[int, list[int]] = {}
        for layer, head in gone:
            by_layer.setdefault(layer, []).append(head)
        places = {f"blocks.{layer}.attn.z": (slice(None), own) for layer, own in by_layer.items()}

        def touch(site, value):
            if site in places:
                value = value.clone()
                where = (slice(None), *places[site])
                value[where] = replacement(clean[site], "mean")[where]
            return value

        with torch.no_grad():
            return by_hand(module, images, touch)[:, 0].double() * 3 + 5

    nothing = left([])
    gap = float((whole - nothing).mean())
    for row in result.table.to_dict("records"):
        text = row["which"]
        heads = [tuple(map(int, part.split("."))) for part in text.replace("without ", "").split(", ") if part]
        kept = {
            "model": every, "nothing": [], "circuit": circuit, "complement": [h for h in every if h not in circuit],
            "circuit without K": [h for h in circuit if h not in heads], "model without K": [h for h in every if h not in heads],
            "circuit without one": [h for h in circuit if h not in heads], "random set": heads,
        }[row["kind"]]  # fmt: skip
        assert row["heads_left"] == len(kept)
        wanted = left(kept)
        assert row["value"] == pytest.approx(float(wanted.mean()), abs=5e-5), row["kind"]
        if not row["reason"]:
            assert row["normalised"] == pytest.approx(float((wanted - nothing).mean()) / gap, abs=1e-3)
    counts = result.table["kind"].value_counts().to_dict()
    assert counts == {
        "model": 1, "nothing": 1, "circuit": 1, "complement": 1, "circuit without K": 4, "model without K": 4,
        "circuit without one": 3, "random set": 3,
    }  # fmt: skip
    assert result.table["value"].nunique() > 6
    assert set(result.figures()) == set(result.captions)


def test_faithfulness_of_a_model_whose_heads_do_nothing_has_no_number() -> None:
    module = TIMM_PLAIN.module()
    for block in module.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    result = faithfulness(vmi.wrap(module), TIMM_PLAIN.images(3), [(0, 0)], metric=metric)
    assert result.table["normalised"].isna().all()
    assert "Faithfulness is not defined" in result.description
    assert set(result.figures()) == set(result.captions) == {"change"}


def test_folders_of_images_and_finished_parts(tmp_path: Path) -> None:
    from PIL import Image

    for k in range(3):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    vit = vmi.wrap(TIMM_PLAIN.module())
    kept = tmp_path / "kept"
    first = ablation_sweep(vit, tmp_path, folder=kept, metric="accuracy", neurons={1: [2]})
    again = ablation_sweep(vit, tmp_path, folder=kept, metric="accuracy", neurons={1: [2]})
    assert len(list(kept.glob("*.safetensors"))) == 2, "the runs, and what the means of neurons are made of"
    pd.testing.assert_frame_equal(first.table, again.table)
    assert first.table["n"].eq(3).all()
    assert first.table["value"].isin([0, 1 / 3, 2 / 3, 1]).all()


def test_tokens_that_do_not_fit_are_named_before_the_first_image_is_looked_at() -> None:
    vit, seen = vmi.wrap(TIMM_PLAIN.module()), []
    vit.module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for wrong, error, what in (([0, 99], SpecError, "patch 99 is not on the 4x4 grid"), ({"column": "cornr"}, DataError, "no column 'cornr'")):
        with pytest.raises(error, match=what):
            ablation_sweep(vit, TIMM_PLAIN.images(6), token_sets={"corner": wrong})
        with pytest.raises(error, match=what):
            activation_patching(vit, {"base": TIMM_PLAIN.images(6), "source": TIMM_PLAIN.images(6, 1)}, token_sets={"corner": (wrong, wrong)})
        with pytest.raises(error, match=what):
            steering(vit, TIMM_PLAIN.images(6), {"blocks.1.resid_post": torch.ones(24)}, tokens=wrong)
    assert set(seen) <= {1}


def test_neurons_of_a_dataset_are_resampled_as_those_of_a_mapping(tmp_path: Path) -> None:
    from datasets import Dataset
    from PIL import Image

    pictures = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (40, 40, 3), dtype=np.uint8)) for k in range(4)]
    vit = vmi.wrap(TIMM_PLAIN.module())
    tables = [
        ablation_sweep(vit, data, parts=[], methods=["resample"], neurons={1: [2, 5]}, metric=metric, seed=SEED, progress=False).table
        for data in ({"base": pictures}, Dataset.from_dict({"base": pictures}))
    ]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["change"].abs().max() > 1e-4


def test_bad_input_is_named() -> None:
    vit, images = vmi.wrap(TIMM_PLAIN.module()), TIMM_PLAIN.images(2)
    with pytest.raises(SpecError, match=r"There is no part 'head'\. Close matches: heads"):
        ablation_sweep(vit, images, parts=("head",))
    with pytest.raises(SpecError, match=r"method='knockout' is not known"):
        ablation_sweep(vit, images, methods=("knockout",))
    with pytest.raises(SpecError, match=r"blocks\.1\.mlp\.post has neurons 0 to 95; there is no neuron 96"):
        ablation_sweep(vit, images, neurons={1: [96]})
    with pytest.raises(SpecError, match="layer 9 is out of range"):
        ablation_sweep(vit, images, neurons={9: [0]})
    with pytest.raises(SpecError, match="There is no head 3 in layer 0; the model has layers 0 to 2 with 3 heads each"):
        faithfulness(vit, images, [(0, 3)])
    with pytest.raises(SpecError, match="No head is named"):
        faithfulness(vit, images, [])
    with pytest.raises(SpecError, match="The set holds all 9 heads"):
        faithfulness(vit, images, [(layer, head) for layer in range(3) for head in range(3)])
    with pytest.raises(SpecError, match="step=0"):
        cumulative_ablation(vit, images, order=[(0, 0)], step=0)
