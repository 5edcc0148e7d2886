"""Layers, attributes, controls and seeds trained at once: the same as one after the other, from shared clean forwards."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import vit_mechinterp as vmi
from tests.circuits.test_das import GRID, LAYERS, PATCH, QUICK, pairs, vit
from vit_mechinterp.circuits import subspace_training
from vit_mechinterp.circuits.das import das, das_by_attribute
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.engine import ActivationStore, Batch
from vit_mechinterp.errors import ExecutionError

assert vit  # the fixture
SEEDS = (3, 5)


@pytest.fixture
def exact(vit: vmi.HookedViT, monkeypatch: pytest.MonkeyPatch) -> vmi.HookedViT:
    """The model in float64, and so the trainings, with an epsilon of Adam far above rounding: while all gates are half open, a
    rotation's gradient is rounding alone, which Adam scales up."""
    monkeypatch.setattr(torch.optim, "Adam", partial(torch.optim.Adam, eps=1e-5))
    return vmi.wrap(copy.deepcopy(vit.module).double())


@pytest.fixture(scope="module")
def data(vit: vmi.HookedViT) -> dict[str, Any]:
    """Two attributes of equally many examples, and one of fewer."""
    return {
        name: (pairs(n, seed, vit), pairs(6, seed + 1, vit))
        for name, n, seed in (("shape", 12, 1), ("color", 12, 3), ("size", 7, 5))
    }


def table_of(result: CircuitResult, **facts: Any) -> Any:
    table = result.table
    for name, value in facts.items():
        table = table[table[name] == value]
    return table.reset_index(drop=True)


def same(found: CircuitResult, wanted: CircuitResult, prefix: str = "", **facts: Any) -> None:
    rows, alone = table_of(found, **facts), wanted.table
    assert len(rows) == len(alone) == LAYERS
    for column in ("train_loss", "loss"):
        assert rows[column].tolist() == pytest.approx(alone[column].tolist(), rel=1e-5)
    for name, tensor in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[prefix + name], tensor, rtol=0, atol=1e-7)


def test_each_is_trained_as_if_alone(exact: vmi.HookedViT, data: dict[str, Any]) -> None:
    together = das_by_attribute(exact, data, seeds=SEEDS, **QUICK)
    assert len(together.table) == 3 * 2 * len(SEEDS) * LAYERS
    assert list(together.table.columns[:5]) == ["attribute", "control", "seed", "layer", "site"]
    # Waves of few rows: runs cut in two, layers and attributes apart.
    cut = das_by_attribute(exact, data, seeds=SEEDS, rows_at_once=5, **QUICK)
    for attribute, control, seed in (("shape", None, 3), ("color", "wrong_object", 5), ("size", None, 5)):
        alone = das(exact, *data[attribute], attribute=attribute, control=control, seed=seed, **QUICK)
        prefix = f"{attribute}.{f'{control}.' if control else ''}seed_{seed}."
        facts = {"attribute": attribute, "control": control or "none", "seed": seed}
        for result in (together, cut):
            same(result, alone, prefix, **facts)
    losses = together.table.groupby(["attribute", "control", "seed"])["train_loss"].first()
    assert losses.nunique() == len(losses)
    moved = das(exact, *data["shape"], seed=3, **{**QUICK, "learning_rate": 0.0})
    change = together.tensors["shape.seed_3.rotation_0"] - moved.tensors["rotation_0"]
    assert change.abs().max() > 0.05


def test_clean_images_are_shared_by_layers_controls_and_seeds(vit: vmi.HookedViT, data: dict[str, Any]) -> None:
    images: list[int] = []
    vit.sites()
    count = vit.module.patch_embed.register_forward_pre_hook(lambda m, a: images.append(int(a[0].flatten(1).any(1).sum())))
    result = das_by_attribute(vit, data, seeds=SEEDS, **QUICK)
    count.remove()
    assert sum(images) == 2 * (12 + 12 + 7) + 2 * 3 * 6
    searches = result.provenance["searches"]
    assert len(searches) == 6
    assert searches["size, none"]["clean_evaluations"] == 2 * 7 * LAYERS
    assert [searches[f"{name}, none"]["steps"] for name in data] == [4, 4, 2]
    assert searches["shape, wrong_object"]["seed"] == result.provenance["seed"] == list(SEEDS)


def test_clean_values_come_from_a_store(vit: vmi.HookedViT, data: dict[str, Any], tmp_path: Any) -> None:
    with ActivationStore(tmp_path) as store:
        first, again = (das(vit, *data["shape"], store=store, **QUICK) for _ in range(2))
    assert first.provenance["training"]["clean_evaluations"] == 24 * LAYERS
    assert again.provenance["training"]["clean_evaluations"] == 0
    assert first.table.equals(again.table)


def test_running_out_of_memory_halves_the_rows_and_changes_nothing(
    exact: vmi.HookedViT, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = das(exact, *data["shape"], **QUICK)
    original, most = subspace_training.run_together, 7

    def limited(batches: Sequence[Batch], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        outputs = original(batches, tensors)
        if sum(batch.rows for batch in batches) > most:
            torch.autograd.backward(outputs[0].sum())  # some gradients are there already
            raise torch.OutOfMemoryError("out of memory")
        return outputs

    monkeypatch.setattr(subspace_training, "run_together", limited)
    with caplog.at_level(logging.WARNING):
        same(das(exact, *data["shape"], **QUICK), wanted)
    # 8 examples at 3 layers are 24 rows; what fitted once is kept for the steps to come.
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [f"Out of memory at {n} rows per forward: going on with {n // 2}." for n in (24, 12)]
    most = 0
    with pytest.raises(ExecutionError, match=r"Out of memory with one row per forward: .*a smaller memory=.*half precision .*more memory\."):
        das(exact, *data["shape"], **QUICK)


def test_seeds_of_one_search(vit: vmi.HookedViT, data: dict[str, Any]) -> None:
    result = das(vit, *data["shape"], attribute="shape", seeds=SEEDS, **QUICK)
    assert result.table["seed"].tolist() == [3] * LAYERS + [5] * LAYERS
    assert set(result.tensors) == {f"seed_{s}.{x}_{n}" for s in SEEDS for x in ("rotation", "gate") for n in range(LAYERS)}
    means = result.table.groupby("layer")["accuracy"].mean()
    assert result.summary == {f"shape, layer {means.argmax()}": means.max(), "chance": 0.5}
    assert "Means of 2 seeds." in result.description
    line = result.figures()["das_by_layer"].axes[0].lines[0]
    assert list(line.get_ydata()) == pytest.approx(means.tolist())


def test_the_summary_says_what_was_found(vit: vmi.HookedViT, data: dict[str, Any]) -> None:
    shape = {"shape": data["shape"]}
    result = das_by_attribute(vit, shape, **QUICK)
    search, control = (table_of(result, control=name).set_index("layer") for name in ("none", "wrong_object"))
    layer = int(search["accuracy"].idxmax())
    best, other = search["accuracy"][layer], control["accuracy"][layer]
    assert result.summary == {f"shape, layer {layer}": best, "shape, wrong object": other, "chance": 0.5}
    assert result.description.split("\n\n")[-1] == (
        f"Shape: best in layer {layer}, where exchanging {search['rank'][layer]} of 16 dimensions gives the counterfactual "
        f"answer to {best:.0%} of 6 held-out pairs, and the wrong object to {other:.0%}; in layer 2, the last searched, to "
        f"{search['accuracy'][2]:.0%}."
    )
    alone = das_by_attribute(vit, shape, controls=["wrong_object"], **QUICK)
    assert f"shape, wrong object, layer {int(control['accuracy'].idxmax())}" in alone.summary


def test_scores_that_are_called_otherwise_are_classes_too() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPVisionConfig(image_size=GRID * PATCH, patch_size=PATCH, projection_dim=6, **sizes)
    clip = vmi.wrap(CLIPVisionModelWithProjection(config).eval())
    assert clip.layout.output == "image_embeds"
    draw = torch.Generator().manual_seed(0)
    data: dict[str, Any] = {name: torch.randn(8, 3, GRID * PATCH, GRID * PATCH, generator=draw) for name in ("base", "source")}
    data |= {name: torch.randint(0, 16, (8, 2), generator=draw) for name in ("here", "there")}
    data["counterfactual_label"] = clip(data["source"]).argmax(dim=-1)
    tokens = {"tokens": {"column": "here"}, "source_tokens": {"column": "there"}}
    result = das(clip, data, data, **tokens, **QUICK)
    assert result.summary["chance"] == pytest.approx(1 / 6)
    swap = vmi.Run.model_validate({"name": "r", "interventions": [
        {"op": "inject_subspace", "site": "blocks.0.resid_post", "source": "source", "basis": "rotation_0", "gate": "gate_0", **tokens}
    ]})  # fmt: skip
    outputs = vmi.execute(clip, swap, data, tensors=result.tensors, progress=False).logits[0]
    assert result.table["accuracy"][0] == (outputs.argmax(dim=-1) == data["counterfactual_label"]).double().mean()
    assert set(result.table["no_effect"]) == {
        (clip(data["base"]).argmax(dim=-1) == data["counterfactual_label"]).double().mean().item()
    }
