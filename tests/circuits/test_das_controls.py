"""Controls, splits, variants and schedules of distributed alignment search, against forwards made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_linear_schedule_with_warmup

import vit_mechinterp as vmi
from tests.circuits.test_das import GRID, LAYERS, QUICK, D, by_hand, pairs, tokens_of, vit
from tests.tiny_models import TIMM_PLAIN, TIMM_REGISTERS, Tiny, _clip, _vit
from vit_mechinterp.circuits.alignment import GatedRotations, learning_rate_factor, temperature
from vit_mechinterp.circuits.attention_stages import attention_stages
from vit_mechinterp.circuits.das import das, das_by_attribute
from vit_mechinterp.circuits.das_controls import with_random_patches
from vit_mechinterp.circuits.fresh_weights import with_fresh_weights
from vit_mechinterp.errors import DataError, SpecError, UnsupportedModelError
from vit_mechinterp.spec import TokenBox

assert vit  # the fixture
N_PATCHES = GRID * GRID


@pytest.fixture(scope="module")
def train(vit: vmi.HookedViT) -> dict[str, Any]:
    return pairs(12, 21, vit)


@pytest.fixture(scope="module")
def test(vit: vmi.HookedViT) -> dict[str, Any]:
    return pairs(10, 22, vit)


def patched(data: dict[str, Any], vit: vmi.HookedViT, *controls: str, seed: int = 0) -> dict[str, Any]:
    selectors = {"tokens": TokenBox(box="edited_box"), "source_tokens": TokenBox(box="source_box")}
    found: dict[str, Any] = with_random_patches(
        vit, data, controls, base="base", source="source", seed=seed, **selectors
    )
    return found


def at_patches(vit: vmi.HookedViT, data: dict[str, Any], here: Tensor, there: Tensor, rotation: Tensor, gate: Tensor) -> Tensor:
    """Logits with the gated interchange of some patches at block 0, from the published formula and plain hooks."""
    block, row, seen = vit.module.blocks[0], torch.arange(len(here))[:, None], []
    keep = block.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        vit.module(data["source"])
    keep.remove()

    def edit(m: nn.Module, a: Any, out: Tensor) -> Tensor:
        b, s = out[row, 1 + here] @ rotation, seen[0][row, 1 + there] @ rotation
        return out.index_put((row, 1 + here), ((1 - gate) * b + gate * s) @ rotation.T)

    handle = block.register_forward_hook(edit)
    with torch.no_grad():
        logits: Tensor = vit.module(data["base"])
    handle.remove()
    return logits


def test_random_patches_are_as_many_as_the_object_has_and_avoid_all_objects(vit: vmi.HookedViT, test: dict[str, Any]) -> None:
    found = patched(test, vit, "random_patch", "random_patch_anywhere")
    objects = torch.cat([tokens_of(test[f"{name}_box"]) - 1 for name in ("edited", "source", "source_other")], dim=1)
    touched = 0
    for side in ("tokens", "source_tokens"):
        for example, rows in enumerate(zip(found[f"random_patch_{side}"], found[f"random_patch_anywhere_{side}"], strict=True)):
            covered = set(objects[example].tolist())
            assert all(len(set(row)) == 4 and set(row) <= set(range(N_PATCHES)) for row in rows)
            assert not covered & set(rows[0])
            touched += len(covered & set(rows[1]))
    assert touched > 0
    assert found["random_patch_anywhere_tokens"] != found["random_patch_anywhere_source_tokens"]
    assert patched(test, vit, "random_patch_anywhere")["random_patch_anywhere_tokens"] == found["random_patch_anywhere_tokens"]
    other = patched(test, vit, "random_patch_anywhere", seed=1)
    assert other["random_patch_anywhere_tokens"] != found["random_patch_anywhere_tokens"]
    full = {**test, "table_box": torch.tensor([[0, 0, 32, 16]]).repeat(10, 1)}
    with pytest.raises(DataError, match=r"Example \d: [0-3] patches lie outside all objects, and the control 'random_patch' draws 4"):
        patched(full, vit, "random_patch")
    placeless = {name: column for name, column in test.items() if not name.endswith("_box")} | {"edited": test["edited_box"], "there": test["source_box"]}
    with pytest.raises(DataError, match="avoids the objects, and the data has no columns of boxes or tokens"):
        with_random_patches(
            vit, placeless, ["random_patch"], tokens=TokenBox(box="edited"), source_tokens=TokenBox(box="there"),
            base="base", source="source", seed=0,
        )  # fmt: skip


@pytest.mark.parametrize("control", ["random_patch", "random_patch_anywhere"])
def test_random_patches_have_a_search_of_their_own(
    vit: vmi.HookedViT, train: dict[str, Any], test: dict[str, Any], control: Any
) -> None:
    result = das(vit, train, test, control=control, layers=[0], **QUICK)
    found = patched(test, vit, control)
    here, there = (torch.tensor(found[f"{control}_{side}"]) for side in ("tokens", "source_tokens"))
    rotation, gate = result.tensors["rotation_0"], result.tensors["gate_0"]
    logits = at_patches(vit, test, here, there, rotation, gate)
    row = result.table.iloc[0]
    assert row["loss"] == pytest.approx(functional.cross_entropy(logits, test["counterfactual_label"]).item(), abs=1e-4)
    assert (logits - vit(test["base"])).abs().max() > 0.05
    plain = das(vit, train, test, layers=[0], **QUICK)
    assert (plain.tensors["rotation_0"] - rotation).abs().max() > 1e-3


def test_random_weights_are_searched_as_a_model_of_their_own(
    vit: vmi.HookedViT, train: dict[str, Any], test: dict[str, Any]
) -> None:
    controls = (None, "random_weights", "random_patch")
    how = {**QUICK, "layers": [0, 1]}
    result = das_by_attribute(vit, {"shape": (train, test)}, controls=controls, **how)
    fresh = with_fresh_weights(vit, 0)
    alone = das(fresh, train, test, attribute="shape", **how)
    own = result.table[result.table["control"] == "random_weights"].reset_index(drop=True)
    assert own.drop(columns="control").equals(alone.table.drop(columns="control"))
    assert torch.equal(result.tensors["shape.random_weights.rotation_0"], alone.tensors["rotation_0"])
    assert result.provenance["model"] == vit.fingerprint()
    assert result.provenance["searches"]["shape, random_weights"]["model"] == fresh.fingerprint()
    assert result.table["control"].tolist() == [name or "none" for name in controls for _ in range(2)]
    figure = result.figures()["das_controls"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"search", "random weights", "random patch", "chance"}
    texts = {text.get_text() for text in result.figures()["das_by_layer"].axes[0].texts}
    assert "shape" in texts
    assert not any("random" in text for text in texts)
    assert "random-weights control searches the same architecture" in result.description


@pytest.mark.parametrize("recipe", [TIMM_PLAIN, TIMM_REGISTERS, "hf-vit", "hf-clip"], ids=["timm-plain", "timm-registers", "hf-vit", "hf-clip"])
def test_fresh_weights_are_the_same_architecture_drawn_anew(recipe: Any) -> None:
    builders: dict[str, Callable[[], nn.Module]] = {"hf-vit": _vit, "hf-clip": _clip}
    model = recipe if isinstance(recipe, Tiny) else Tiny(recipe, builders[recipe], ("cls",), (4, 4), 8, 3, 8)
    vit = vmi.wrap(model.module())
    before, state = vit.fingerprint(), torch.get_rng_state()
    fresh, again, other = (with_fresh_weights(vit, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert vit.fingerprint() == before
    assert fresh.fingerprint() == again.fingerprint() not in (other.fingerprint(), before)
    assert type(fresh.module) is type(vit.module)
    assert not fresh.module.training
    for (name, new), old in zip(fresh.module.named_parameters(), vit.module.parameters(), strict=True):
        assert new.shape == old.shape
        assert not torch.equal(new, old), name
        # Weights of linear maps are as small as the library makes them; the tiny model's own are wide.
        if name.endswith(("fc1.weight", "qkv.weight", "q_proj.weight", "query.weight")):
            assert new.std() < 0.5 * old.std(), name
    images = model.images(2)
    assert (fresh(images) - vit(images)).abs().max() > 0.05
    assert "fresh weights from seed 1" in str(fresh.source)


def test_weights_that_nothing_initialises_are_named() -> None:
    module = TIMM_PLAIN.module()
    module.blocks[0].norm1.temper = nn.Parameter(torch.tensor([0.2, 0.9]))
    with pytest.raises(UnsupportedModelError, match=r"VisionTransformer cannot be given fresh weights: nothing initialises blocks\.0\.norm1\.temper\."):
        with_fresh_weights(vmi.wrap(module))


def test_the_authors_schedule_is_that_of_their_code() -> None:
    found = [temperature(epoch, 20, "authors") for epoch in range(20)]
    inverse = (200 ** (torch.arange(20) / 19)).to(torch.bfloat16)
    assert found == (1 / inverse).float().tolist()
    exact = [temperature(epoch, 20) for epoch in range(20)]
    assert found != exact
    assert found == pytest.approx(exact, rel=1e-2)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0.1 * 25, num_training_steps=25)
    for step in range(25):
        assert learning_rate_factor(step, 25, "authors") == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert learning_rate_factor(0, 25) > 0


def test_tokens_may_be_permuted_by_example(vit: vmi.HookedViT, train: dict[str, Any], test: dict[str, Any]) -> None:
    still = {**QUICK, "epochs": 1, "batch_size": 12, "learning_rate": 0.0, "mask_learning_rate": 0.0, "layers": [0]}
    by_example = das(vit, train, test, permutation="example", **still)
    random = np.random.default_rng((0, 0))
    order = random.permutation(12).tolist()
    orders = {example: tuple(random.permutation(4).tolist()) for example in order}
    assert len(set(orders.values())) > 3
    rotation = GatedRotations([0], D).rotation[0].detach()
    gate = torch.full((D,), 0.5)
    each = []
    with torch.no_grad():
        for example in range(12):
            one = {name: column[example : example + 1] for name, column in train.items()}
            logits = by_hand(vit.module, one, 0, rotation, gate, order=orders[example])
            each.append(functional.cross_entropy(logits, one["counterfactual_label"]).item())
    assert by_example.table["train_loss"][0] == pytest.approx(np.mean(each) + 1e-3 * D / 2, rel=1e-5)
    by_batch = das(vit, train, test, **still)
    assert by_batch.table["train_loss"][0] != pytest.approx(by_example.table["train_loss"][0], rel=1e-5)
    moved = das(vit, train, test, permutation="example", layers=[0, 1], rows_at_once=5, **QUICK)
    whole = das(vit, train, test, permutation="example", layers=[0, 1], **QUICK)
    assert moved.table["train_loss"].tolist() == pytest.approx(whole.table["train_loss"].tolist(), rel=5e-2)


def test_several_splits_are_measured_with_the_same_subspaces(
    vit: vmi.HookedViT, train: dict[str, Any], test: dict[str, Any]
) -> None:
    harder = pairs(8, 23, vit)
    result = das(vit, train, {"iid": test, "compositional": harder}, **QUICK)
    assert result.table["split"].tolist() == ["iid"] * LAYERS + ["compositional"] * LAYERS
    for split, data in (("iid", test), ("compositional", harder)):
        alone = das(vit, train, data, **QUICK)
        rows = result.table[result.table["split"] == split].reset_index(drop=True)
        assert set(alone.table["split"]) == {"test"}
        assert rows.drop(columns="split").equals(alone.table.drop(columns="split"))
        for name, tensor in alone.tensors.items():
            assert torch.equal(tensor, result.tensors[name])
    assert ((result.table["accuracy_low"] <= result.table["accuracy"]) & (result.table["accuracy"] <= result.table["accuracy_high"])).all()
    panels = [axes.get_title(loc="left") for axes in result.figures()["das_splits"].axes]
    assert panels == ["iid", "compositional"]
    assert any(name.endswith(", compositional") for name in result.summary)
    with pytest.raises(DataError, match=r"here are both: iid are datasets, .*base, .* are not"):
        das(vit, train, {"iid": test, **test}, **QUICK)


def test_variants_of_pairs_have_accuracies_of_their_own(vit: vmi.HookedViT, train: dict[str, Any], test: dict[str, Any]) -> None:
    relation = torch.tensor([0, 1] * 5)
    pair = ["sample"] * 6 + ["display"] * 4
    result = das(vit, train, {**test, "intermediate_judgement": relation, "edited_pair": pair}, layers=[0], **QUICK)
    with torch.no_grad():
        logits = by_hand(vit.module, test, 0, result.tensors["rotation_0"], result.tensors["gate_0"])
    hits = (logits.argmax(dim=-1) == test["counterfactual_label"]).double()
    row = result.table.iloc[0]
    for value, word in ((0, "different"), (1, "same")):
        for name in ("sample", "display"):
            own = (relation == value) & torch.tensor([each == name for each in pair])
            column = f"accuracy_{word}_{name}"
            assert row[column] == hits[own].mean().item()
            assert row[f"{column}_low"] <= row[column] <= row[f"{column}_high"]
    assert "das_variants" in result.figures()
    assert "accuracy_same_sample" not in das(vit, train, test, layers=[0], **QUICK).table


def test_layers_are_coloured_by_the_attention_stages_of_the_same_model(
    vit: vmi.HookedViT, train: dict[str, Any], test: dict[str, Any]
) -> None:
    objects = [{"box": "source_box"}, {"column": "corner"}]
    apart = {**test, "corner": [[next(p for p in range(N_PATCHES) if p + 1 not in tokens)] for tokens in tokens_of(test["source_box"]).tolist()]}
    stages = attention_stages(vit, apart, objects, base="source", example=None, progress=False)
    result = das(vit, train, test, stages=stages, layers=[0], **QUICK)
    heat = stages.table.groupby("layer")["heat"].mean().clip(0, 1).tolist()
    assert result.provenance["layer_heat"] == pytest.approx(heat)
    assert "global score" in result.captions["das_by_layer"]
    assert len(result.figures()["das_by_layer"].axes[0].patches) == LAYERS
    with pytest.raises(DataError, match="attention stages were measured on another model"):
        das(with_fresh_weights(vit), train, test, stages=stages, **QUICK)
    with pytest.raises(SpecError, match="comes from a result of attention_stages, not of 'das'"):
        das(vit, train, test, stages=result, **QUICK)


def test_held_out_data_that_does_not_fit_is_said_before_the_training(
    vit: vmi.HookedViT, train: dict[str, Any], test: dict[str, Any]
) -> None:
    rows: list[int] = []
    vit.sites()
    count = vit.module.blocks[0].register_forward_hook(lambda m, a, out: rows.append(len(out)))
    lacking = {name: column for name, column in test.items() if name != "source_box"}
    with pytest.raises(DataError, match="has no column 'source_box'"):
        das(vit, train, {"iid": test, "compositional": lacking}, **QUICK)
    small = {**test, "source_box": test["source_box"] - torch.tensor([0, 0, 8, 0])}
    with pytest.raises(SpecError, match="example 0 selects 4 base tokens and 2 source tokens"):
        das(vit, train, small, **QUICK)
    off_grid = {**test, "places": torch.full((10, 4), N_PATCHES) + torch.arange(4)}
    with pytest.raises(SpecError, match=r"patch 16 is not on the 4x4 grid \(patches 0 to 15\)"):
        das(vit, {**train, "places": torch.arange(48).reshape(12, 4) % 16}, off_grid, tokens={"column": "places"}, **QUICK)
    for name, value in (("permutation", "token"), ("schedule", "author")):
        with pytest.raises(SpecError, match=f"{name}='{value}' is not known. Choose one of"):
            das(vit, train, test, **{**QUICK, name: value})
    assert max(rows) == 1  # a blank image tells how many classes there are
    count.remove()
