"""Probe and intervention, against the same written out: one probe at a time, one image at a time, raw additions."""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vit_mechinterp as vmi
from tests.oracles import by_hand
from tests.tiny_models import HF_DINOV2, N_LAYERS, TIMM_PLAIN, TIMM_POOLED
from vit_mechinterp.circuits.attention_stages import attention_stages
from vit_mechinterp.circuits.linear_probes import ProbeTraining, train_probes
from vit_mechinterp.circuits.probe_intervention import PUBLISHED, ObjectPair, draw, probe_intervention
from vit_mechinterp.errors import DataError, ExecutionError, SpecError

N = 12
QUICK = {"epochs": 3, "batch_size": 8, "alphas": (20.0, 300.0), "progress": False, "resamples": 50}


def two_pairs(n: int = N, seed: int = 0) -> dict:
    """Four objects of two tokens each; every relation leaves a trace in the pixels."""
    draw = np.random.default_rng(seed)
    relations = draw.integers(0, 2, (2, n))
    relations[:, :2] = [[0, 1], [1, 0]]
    images = TIMM_PLAIN.images(n, seed=seed + 3)
    boxes = {
        "box_1": [[0, 16, 16, 24], [16, 16, 32, 24]], "box_2": [[0, 24, 16, 32], [16, 24, 32, 32]],
        "display_box_1": [[0, 0, 16, 8]], "display_box_2": [[16, 0, 32, 8]],
    }  # fmt: skip
    columns: dict = {name: [some[i % len(some)] for i in range(n)] for name, some in boxes.items()}
    for pair, names in enumerate((("box_1", "box_2"), ("display_box_1", "display_box_2"))):
        for i in range(n):
            for name in names:
                x0, y0, x1, y1 = columns[name][i]
                images[i, :, y0:y1, x0:x1] += 1.5 * (2 * relations[pair, i] - 1)
    return {
        "base": images, **columns, "sample_relation": relations[0].tolist(), "display_relation": relations[1].tolist(),
        "label": (relations[0] == relations[1]).astype(int).tolist(),
    }  # fmt: skip


def tokens_of(columns: dict, pair: str, example: int) -> list[int]:
    """Places on the token axis, behind CLS: the first object's, then the second's."""
    found = []
    for name in (f"{pair}box_1", f"{pair}box_2"):
        x0, y0, x1, y1 = (edge // 8 for edge in columns[name][example])
        found += [1 + 4 * row + column for row in range(y0, y1) for column in range(x0, x1)]
    return found


PAIRS = {"sample": "", "display": "display_"}


@torch.no_grad()
def activations(module: nn.Module, columns: dict, site: str) -> torch.Tensor:
    """The concatenated tokens of every pair, all sample pairs before all display pairs."""
    seen = {}

    def keep(name: str, value: torch.Tensor) -> torch.Tensor:
        seen[name] = value
        return value

    by_hand(module, columns["base"], keep)
    rows = [seen[site][i, tokens_of(columns, p, i)].flatten() for p in PAIRS.values() for i in range(len(columns["label"]))]
    return torch.stack(rows)


def relations(columns: dict) -> torch.Tensor:
    return torch.tensor(columns["sample_relation"] + columns["display_relation"])


def trained_alone(x: torch.Tensor, y: torch.Tensor, epochs: int, batch: int, lr: float = 1e-2) -> nn.Linear:
    torch.manual_seed(0)
    probe = nn.Linear(x.shape[1], 2)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for examples in torch.randperm(len(x), generator=order).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(probe(x[examples]), y[examples]).backward()
            optimizer.step()
    return probe


@torch.no_grad()
def answers(module: nn.Module, columns: dict, site: str, pair: str, probe: nn.Linear, alpha: float, own: bool) -> np.ndarray:
    """Predictions after adding, image by image, the row of the relation that the pair has (own) or has not."""
    found = []
    for i in range(len(columns["label"])):
        relation = columns[f"{pair}_relation"][i]
        row = probe.weight[relation if own else 1 - relation]
        places = tokens_of(columns, PAIRS[pair], i)

        def touch(name: str, value: torch.Tensor, row=row, places=places) -> torch.Tensor:
            if name == site:
                value = value.clone()
                value[0, places] += alpha * row.reshape(len(places), *value.shape[2:])
            return value

        found.append(int(by_hand(module, columns["base"][i : i + 1], touch).argmax()))
    return np.array(found)


@pytest.mark.parametrize(
    ("site", "intervene_at"), [("resid_post", None), ("attn.z", None), ("resid_pre", "resid_post")]
)
def test_every_cell_equals_probes_trained_alone_and_additions_by_hand(site, intervene_at) -> None:
    module, train, test = TIMM_PLAIN.module(), two_pairs(24), two_pairs(seed=1)
    vit = vmi.wrap(module)
    where = {"site": site} | ({} if intervene_at is None else {"intervene_at": intervene_at})
    assert intervene_at is None or where == PUBLISHED
    result = probe_intervention(vit, train, test, **where, **QUICK)
    cell = result.table.set_index(["layer", "pair", "quantity", "alpha"])
    probe_rows = result.table[result.table["quantity"] == "probe accuracy"].set_index(["layer", "pair"])
    opposite = 1 - np.array(test["label"])
    clean = by_hand(module, test["base"], lambda _, value: value).argmax(1).numpy()
    assert (result.table["no_effect"] == (clean == opposite).mean()).all()
    for layer in range(N_LAYERS):
        read, write = (f"blocks.{layer}.{name}" for name in (site, intervene_at or site))
        probe = trained_alone(activations(module, train, read), relations(train), 3, 8)
        # attn.z lies on the axes token, head, feature: flattening it is taking heads side by side.
        assert torch.allclose(result.tensors[f"{read}.weight"], probe.weight, atol=2e-4)
        assert torch.allclose(result.tensors[f"{read}.bias"], probe.bias, atol=2e-4)
        x = activations(module, test, read)
        right = (probe(x).argmax(1) == relations(test)).double().reshape(2, -1).mean(1).tolist()
        assert probe_rows["value"][layer, "sample"] == right[0]
        assert probe_rows["value"][layer, "display"] == right[1]
        assert np.isclose(probe_rows["value"][layer, "all"], np.mean(right))
        for alpha in (20.0, 300.0):
            length = alpha * probe.weight.norm(dim=1).mean() / x.norm(dim=1).mean()
            assert np.isclose(cell["relative_length"][layer, "sample", "success", alpha], length.item(), rtol=1e-3)
            for quantity, own in (("success", False), ("control", True)):
                by_pair = []
                for pair in PAIRS:
                    turned = answers(module, test, write, pair, probe, alpha, own) == opposite
                    assert cell["value"][layer, pair, quantity, alpha] == turned.mean(), (layer, pair, quantity, alpha)
                    by_pair.append(turned.mean())
                assert np.isclose(cell["value"][layer, "all", quantity, alpha], np.mean(by_pair))
    strong = result.table[result.table["alpha"] == 300]
    assert (strong["value"] - strong["no_effect"]).abs().max() > 0.1
    ways = strong.pivot_table(index=["layer", "pair"], columns="quantity", values="value")
    lead = ways["success"] - ways["control"]
    assert lead.abs().max() > 0.05  # the two rows do not do the same
    together = lead.xs("all", level="pair")
    assert np.isclose(result.summary[f"largest lead over the control, alpha 300, layer {together.idxmax()}"], together.max())
    assert (result.table["site"].str.endswith(site)).all()
    assert (result.table["intervention_site"].str.endswith(intervene_at or site)).all()
    # Both pairs, one plan: a clean forward of every image is shared by everything.
    assert result.table["n"].eq(N).all()


def test_the_figures_show_the_table() -> None:
    vit, train, test = vmi.wrap(TIMM_PLAIN.module()), two_pairs(24), two_pairs(seed=1)
    stages = attention_stages(vit, test, progress=False)
    result = probe_intervention(vit, train, test, stages=stages, layers=[0, 2], **QUICK)
    table = result.table
    assert list(table.columns) == [
        "layer", "site", "intervention_site", "alpha", "pair", "quantity", "value", "value_low", "value_high", "n",
        "no_effect", "relative_length", "global_score",
    ]  # fmt: skip
    assert len(table) == 2 * 3 * (1 + 2 * 2)
    assert ((table["value_low"] <= table["value"]) & (table["value"] <= table["value_high"])).all()
    heat = stages.table.groupby("layer")["heat"].mean().clip(0, 1)
    assert (table["global_score"] == table["layer"].map(heat)).all()
    figures = result.figures()
    assert list(figures) == list(result.captions)
    assert list(figures) == ["alpha_20", "pairs_alpha_20", "alpha_300", "pairs_alpha_300", "alphas"]
    axes = figures["alpha_300"].axes[0]
    rows = table[(table["pair"] == "all") & (table["alpha"].isin([300.0]) | table["alpha"].isna())]
    drawn = [line.get_ydata() for line in axes.lines if line.get_marker() == "o"]
    for line, quantity in zip(drawn, ("probe accuracy", "success", "control"), strict=True):
        values = rows[rows["quantity"] == quantity]["value"].to_numpy()
        np.testing.assert_array_equal(line, [values[0], np.nan, values[1]])
    texts = [text.get_text() for text in axes.texts]
    assert {"probe accuracy", "intervention success", "control", "chance", "no effect"} <= set(texts)
    alone = dataclasses.replace(result, table=table[table["alpha"] != 20], draw=draw)
    assert list(alone.figures()) == ["alpha_300", "pairs_alpha_300"]  # drawn from the table alone
    plain = probe_intervention(vit, train, test, layers=[0, 2], **QUICK)
    assert plain.table.equals(table.drop(columns="global_score"))  # and a second run gives the same numbers


def test_one_pair_whose_relation_is_the_label() -> None:
    module, columns = HF_DINOV2.module(), two_pairs(20)
    one = {"base": columns["base"], "box_1": columns["box_1"], "box_2": columns["box_2"], "label": columns["sample_relation"]}
    result = probe_intervention(vmi.wrap(module), one, held_out=0.4, **QUICK)
    assert set(result.table["pair"]) == {"only"}
    assert (result.table["n"] == 8).all()
    assert list(result.figures()) == ["alpha_20", "alpha_300", "alphas"]
    split = probe_intervention(
        vmi.wrap(module), {k: v[:12] for k, v in one.items()}, {k: v[12:] for k, v in one.items()}, **QUICK
    )
    assert split.table.equals(result.table)
    # The direction of the other class moves answers towards it, that of the own class away from the opposite one.
    wide = result.table[result.table["alpha"] == 300].pivot_table(index="layer", columns="quantity", values="value")
    assert (wide["success"] - wide["control"]).abs().max() > 0.1
    named = {"mine": ObjectPair({"box": "box_1"}, {"box": "box_2"}, "label")}
    assert set(probe_intervention(vmi.wrap(module), one, pairs=named, **QUICK).table["pair"]) == {"mine"}


def test_a_dataset_will_do_as_well_as_columns() -> None:
    datasets = pytest.importorskip("datasets")
    vit, columns = vmi.wrap(TIMM_POOLED.module()), two_pairs(16)
    rows = datasets.Dataset.from_dict({k: v.tolist() if k == "base" else v for k, v in columns.items()}).with_format("torch")
    assert probe_intervention(vit, rows, **QUICK).table.equals(probe_intervention(vit, columns, **QUICK).table)


def test_probes_trained_together_are_trained_as_if_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    x = [torch.randn(40, 7, generator=draw), 3 * torch.randn(40, 7, generator=draw) + 1]
    y = (x[0][:, 0] > 0).long()
    state = torch.get_rng_state()
    probes = train_probes(x, y, ProbeTraining(epochs=5, batch_size=16), progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    for own, weight, bias in zip(x, probes.weight, probes.bias, strict=True):
        alone = trained_alone(own, y, 5, 16)
        assert torch.allclose(weight, alone.weight, atol=1e-5)
        assert torch.allclose(bias, alone.bias, atol=1e-5)
    longer = train_probes(x, y, ProbeTraining(epochs=60, batch_size=16), progress=False)
    assert longer.right(x, y).double().mean(1)[0] > 0.95
    for options, said in (({"epochs": 0}, "epochs=0"), ({"learning_rate": -1.0}, "learning_rate=-1.0: it must be a finite")):
        with pytest.raises(SpecError, match=said):
            ProbeTraining(**options)


def test_bad_input_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, columns = vmi.wrap(TIMM_PLAIN.module()), two_pairs()
    module = sys.modules[probe_intervention.__module__]  # the function has its module's name
    monkeypatch.setattr(module, "execute", lambda *_, **__: pytest.fail("a forward ran"))

    def refused(error: type[Exception], said: str, data: dict | None = None, **options) -> None:
        with pytest.raises(error, match=said):
            probe_intervention(vit, data or columns, **{"test": columns, **options})

    def without(name: str) -> dict:
        return {key: value for key, value in columns.items() if key != name}

    refused(SpecError, r"blocks\.0\.resid_pots.*resid_post", site="resid_pots")
    refused(SpecError, r"blocks\.0\.attn\.pattern is a matrix of tokens by tokens", site="attn.pattern")
    refused(SpecError, "mlp.pre_linear", site="mlp.pre_linear")
    refused(SpecError, r"no direction for blocks\.0\.mlp\.pre: a token there has the shape \[96\], not \[24\]", intervene_at="mlp.pre")
    refused(SpecError, r"layers=\[3\]: name at least one block, each once, of the model's 0 to 2", layers=[3])
    refused(SpecError, r"alphas=\[1\.0, 1\.0\]: give at least one strength, finite, each once", alphas=[1.0, 1.0])
    refused(SpecError, r"alphas=\[nan\]: give at least one strength, finite, each once", alphas=[math.nan])
    refused(SpecError, "weight_decay=inf: it must be a finite number, 0 or more", weight_decay=math.inf)
    refused(SpecError, "learning_rate=nan: it must be a finite number, 0 or more", learning_rate=math.nan)
    refused(SpecError, "resamples=0: an interval takes at least 1", resamples=0)
    for share in (1.0, math.nan, -1.0):
        refused(SpecError, rf"held_out={share} leaves no images to train or to measure on; there are 12", test=None, held_out=share)
    refused(SpecError, "there is no pair of objects", pairs={})
    refused(DataError, "a column 'display_box_1' of pixel boxes or 'display_1_tokens'", without("display_box_1"))
    refused(DataError, "display pair: the data has no column 'display_relation'", without("display_relation"))
    refused(DataError, "the data has no column 'lable'", label="lable")
    refused(DataError, "image of 'box_1': the data has no column 'base'", without("base"))
    refused(DataError, r"column 'label', example 0: \[7\] is neither 0 \(different\) nor 1 \(same\)", test={**columns, "label": [7] * N})
    same = {**columns, "sample_relation": [1] * N, "display_relation": [1] * N}
    refused(DataError, "All pairs to train on are same; a probe for their relation needs both kinds", same)
    wider = {**columns, "box_1": [[0, 8, 32, 16], *columns["box_1"][1:]]}
    refused(DataError, r"cover 6 tokens \(sample pair, example 0\) and 4 tokens .* 4x4 patches of 8x8 pixels", wider)
    refused(DataError, "sample pair, example 0: the objects share a patch", {**columns, "box_2": columns["box_1"]})
    outside = {**columns, "box_1": [[64, 64, 80, 80]] * N}
    refused(DataError, "column 'box_1', example 0", outside)
    taller = {name: [[0, y0, x1, y1] if x0 == 0 else [x0, y0, x1, y1] for x0, y0, x1, y1 in columns[name]] for name in columns if "box" in name}
    taller |= {"box_1": [[0, 16, 16, 32]] * N, "box_2": [[16, 16, 32, 32]] * N, "display_box_1": [[0, 0, 16, 16]] * N, "display_box_2": [[16, 0, 32, 16]] * N}
    refused(DataError, "4 tokens in the images to train on and 8 in those to measure on", test={**columns, **taller})
    stages = attention_stages(vit, columns, progress=False, example=None)
    other = dataclasses.replace(stages, provenance={**stages.provenance, "model": "another"})
    refused(DataError, "the attention stages were measured on another model", stages=other)
    refused(SpecError, "comes from a result of attention_stages, not of 'das'", stages=dataclasses.replace(stages, name="das"))
    headless = vmi.wrap(VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=1).eval())
    with pytest.raises(SpecError, match="one logit for each of the classes 0 and 1"):
        probe_intervention(headless, columns)
    module = TIMM_PLAIN.module()
    module.blocks[0].attn.proj_drop = nn.Dropout(0.1)
    with pytest.raises(ExecutionError, match="train mode"):
        probe_intervention(vmi.wrap(module.train()), columns)
