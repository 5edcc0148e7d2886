"""First-order predictions against finite differences of forwards written by hand, and against exact patching."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import vit_mechinterp as vmi
from tests.circuits.integer_vit import integer_images, integer_vit
from tests.oracles import by_hand
from tests.tiny_models import HF_DINOV2, HF_VIT, N_LAYERS, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, stirred
from tests.zoo.shrink import shrunk
from tests.zoo.transformers_models import build
from vit_mechinterp.circuits.activation_patching import activation_patching
from vit_mechinterp.circuits.attribution_patching import agreement, attribution_patching, chosen_sample
from vit_mechinterp.circuits.edge_attribution import edge_attribution
from vit_mechinterp.circuits.path_patching import edge_patching, path_patching
from vit_mechinterp.errors import SpecError, UnsupportedSiteError

N, STEP = 2, 1e-5
MODELS = [TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED, HF_VIT, HF_DINOV2]


def metric(outputs: torch.Tensor) -> torch.Tensor:
    return outputs[:, 0] + 0.1 * outputs[:, 1] ** 2


def steep(outputs: torch.Tensor) -> torch.Tensor:
    return (outputs[:, 0] - outputs[:, 0].detach()).abs().sqrt() + outputs[:, 1]


def values_of(module, images) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        by_hand(module, images, lambda site, value: values.setdefault(site, value))
    return values


def doubles(tiny) -> tuple:
    module = tiny.module(torch.float64)
    return module, {"base": tiny.images(N, seed=1).double(), "source": tiny.images(N, seed=2).double()}


@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_every_cell_is_the_slope_of_the_hand_made_forward(tiny) -> None:
    module, data = doubles(tiny)
    heads = ("z", "q", "k", "v", "pattern")
    table = attribution_patching(
        vmi.wrap(module), data, direction="noising", sites=("resid_pre", "attn_out", "mlp_out"), heads=heads, window=2,
        metric=metric, sample=0,
    ).table  # fmt: skip
    clean, other = values_of(module, data["base"]), values_of(module, data["source"])
    first = len(tiny.prefix)
    for row in table.to_dict("records"):
        target = f"blocks.{row['layer']}.{row['site']}"
        change = torch.zeros_like(clean[target])
        whole = other[target] - clean[target]
        if row["kind"] == "head":
            index = (slice(None), row["head"]) if row["site"] == "attn.pattern" else (slice(None), slice(None), row["head"])
        elif row["kind"] == "tokens":
            index = (slice(None), [i for i, name in enumerate(tiny.prefix) if name == row["tokens"]])
        else:
            rows, columns = (range(int(row[k]), min(int(row[k]) + 2, n)) for k, n in zip(("row", "column"), tiny.grid, strict=True))
            index = (slice(None), [first + y * tiny.grid[1] + x for y in rows for x in columns])
        change[index] = whole[index]

        def at(step, target=target, change=change) -> torch.Tensor:
            with torch.no_grad():
                return metric(by_hand(module, data["base"], lambda site, value: value + step * change if site == target else value))

        slope = (at(STEP) - at(-STEP)) / (2 * STEP)
        assert row["change"] == pytest.approx(float(slope.mean()), rel=1e-5, abs=1e-7), (target, row["tokens"], row["head"])
        assert row["pair_change"] == pytest.approx(float(slope[0]), rel=1e-5, abs=1e-7)
    assert float((table["change"].abs() > 1e-4).mean()) > 0.7


@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_every_edge_is_the_slope_of_two_hand_made_forwards(tiny) -> None:
    module, data = doubles(tiny)
    last = N_LAYERS - 1
    senders = ["embed", ("blocks.0.attn.z", 1), "blocks.1.attn.z", "blocks.0.mlp_out", f"blocks.{last}.mlp_out"]
    receivers = [(f"blocks.{last}.attn.{name}", head) for name in "qkv" for head in range(tiny.n_heads)]
    receivers += ["blocks.1.attn.k", "blocks.0.mlp", f"blocks.{last}.mlp", "logits"]
    result = edge_attribution(vmi.wrap(module), data, senders=senders, receivers=receivers, metric=metric, sample=0)
    clean, other = values_of(module, data["base"]), values_of(module, data["source"])
    for row in result.table.to_dict("records"):
        layer, kind, at = row["sender_layer"], row["receiver_kind"], row["receiver_layer"]
        writes = {"embed": "embed", "head": f"blocks.{layer}.attn.result", "mlp": f"blocks.{layer}.mlp_out"}[row["sender_kind"]]
        sent = other[writes] - clean[writes]
        if row["sender_kind"] == "head":
            sent = sent.sum(2) if pd.isna(row["sender_head"]) else sent[:, :, row["sender_head"]]
        stream = {"logits": f"blocks.{last}.resid_post", "mlp": f"blocks.{at}.resid_mid"}.get(kind, f"blocks.{at}.resid_pre")
        read = {"logits": "logits", "mlp": f"blocks.{at}.mlp.post"}.get(kind, f"blocks.{at}.attn.{kind}")

        @torch.no_grad()
        def moved(step, sent=sent, stream=stream, read=read, row=row) -> torch.Tensor:
            seen: dict[str, torch.Tensor] = {}

            def nudged(site, value):
                return seen.setdefault(site, value + step * sent if site == stream else value)

            output = by_hand(module, data["base"], nudged)
            if read == "logits":
                return metric(output)

            def received(site, value):
                if site != read:
                    return value
                value = value.clone()
                index = slice(None) if pd.isna(row["receiver_head"]) else (slice(None), slice(None), row["receiver_head"])
                value[index] = seen[site][index]
                return value

            return metric(by_hand(module, data["base"], received))

        slope = float(((moved(STEP) - moved(-STEP)) / (2 * STEP)).mean())
        assert row["change"] == pytest.approx(slope, rel=1e-5, abs=1e-7), (row["sender"], row["receiver"])
    assert float((result.table["change"].abs() > 1e-4).mean()) > 0.7


def test_where_the_model_is_linear_predictions_are_exact() -> None:
    vit, data = vmi.wrap(integer_vit()), integer_images()

    def first(outputs):
        return outputs[:, 0]

    exact = edge_patching(vit, data, metric=first).table.iloc[:-1]
    predicted = edge_attribution(vit, data, metric=first, sample="all")
    assert (exact["sender"] + exact["receiver"]).tolist() == (predicted.table["sender"] + predicted.table["receiver"]).tolist()
    np.testing.assert_allclose(predicted.table["change"], exact["change"], atol=1e-5)
    np.testing.assert_allclose(predicted.table["exact"], exact["change"], atol=1e-5)
    assert predicted.summary["mean absolute error"] < 1e-5
    cells = attribution_patching(vit, data, metric=first, sample="all")
    assert cells.summary["mean absolute error"] < 1e-5
    assert cells.table["exact"].abs().max() > 10


def test_integrated_gradients_at_the_embedding_add_up_to_the_gap() -> None:
    module, data = doubles(TIMM_REGISTERS)
    vit = vmi.wrap(module)
    options = {"sites": ("resid_pre",), "heads": (), "layers": [0], "metric": metric, "sample": 0}
    with torch.no_grad():
        gap = float((metric(module(data["base"])) - metric(module(data["source"]))).mean())
    few = attribution_patching(vit, data, method="integrated", steps=2, **options).table["change"].sum()
    many = attribution_patching(vit, data, method="integrated", steps=200, **options).table["change"].sum()
    assert many == pytest.approx(gap, rel=1e-3)
    assert abs(few - gap) > 10 * abs(many - gap)


def test_the_error_is_that_against_exact_patching() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    data = {"base": TIMM_PLAIN.images(N, 1), "source": TIMM_PLAIN.images(N, 2)}
    options = {"direction": "denoising", "heads": ("z", "pattern"), "window": 1, "metric": "log_probability"}
    exact = activation_patching(vit, data, **options).table
    exact = exact[~exact["kind"].isin(["no effect", "whole stream"])].reset_index(drop=True)
    result = attribution_patching(vit, data, sample=30, seed=3, **options)
    table = result.table
    assert (table[["site", "layer", "tokens"]] == exact[["site", "layer", "tokens"]]).all(axis=None)
    known = table["exact"].notna()
    assert int(known.sum()) == 30
    np.testing.assert_allclose(table.loc[known, "exact"], exact.loc[known, "change"], atol=1e-5)
    np.testing.assert_allclose(table.loc[known, "error"], table.loc[known, "change"] - exact.loc[known, "change"], atol=1e-5)
    a, b = table.loc[known, "change"], exact.loc[known, "change"]
    assert result.summary["correlation"] == pytest.approx(float(np.corrcoef(a, b)[0, 1]), abs=1e-4)
    assert result.summary["rank correlation"] == pytest.approx(float(a.corr(b, method="spearman")), abs=0.05)
    assert result.summary["error relative to effect"] == pytest.approx(float((a - b).abs().mean() / b.abs().mean()), rel=1e-3)
    assert set(result.figures()) == set(result.captions)
    assert "error" in result.captions
    largest = set(np.argsort(-table["change"].abs().to_numpy())[:15])
    assert largest <= set(np.flatnonzero(known))


def test_frozen_parameters_and_small_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import vit_mechinterp.circuits.kept_readings as kept_readings

    module = TIMM_PLAIN.module()
    data = {"base": TIMM_PLAIN.images(5, 1), "source": TIMM_PLAIN.images(5, 2)}
    wanted = attribution_patching(vmi.wrap(module), data, metric="probability", sample=0).table
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    monkeypatch.setattr(kept_readings, "_AT_ONCE", 2)
    found = attribution_patching(vmi.wrap(module), data, metric="probability", sample=0).table
    np.testing.assert_allclose(found["change"], wanted["change"], atol=1e-6)
    assert all(parameter.grad is None for parameter in module.parameters())
    edges = edge_attribution(vmi.wrap(module), data, metric="probability", sample=4)
    assert int(edges.table["exact"].notna().sum()) == 4
    assert set(edges.figures()) == set(edges.captions) == {"edges", "error"}


def test_bad_input_is_named_before_the_work() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    data = {"base": TIMM_PLAIN.images(1, 1), "source": TIMM_PLAIN.images(1, 2)}
    with pytest.raises(SpecError, match="The metric rank has no gradient"):
        attribution_patching(vit, data, metric="rank")
    with pytest.raises(SpecError, match="method='exact' is not known"):
        attribution_patching(vit, data, method="exact")
    with pytest.raises(SpecError, match="steps=0"):
        edge_attribution(vit, data, method="integrated", steps=0)
    with pytest.raises(SpecError, match="sample='some' is 'all' or a number"):
        attribution_patching(vit, data, sample="some", heads=())
    with pytest.raises(SpecError, match="gradient of the metric steep is not finite"):
        attribution_patching(vit, data, metric=steep)
    assert chosen_sample(np.array([0.0, 3.0, -4.0, 1.0]), 2, 0)[0] in (0, 1, 2, 3)
    assert 2 in chosen_sample(np.array([0.0, 3.0, -4.0, 1.0]), 2, 0)
    assert agreement(np.zeros(2), np.full(2, np.nan)) == {"cells measured": 0}


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [1, 0, 3, 2]])
def test_equal_predictions_share_their_rank(order: list[int]) -> None:
    # Ranks 1.5, 1.5, 3, 4 beside 1, 2, 3, 4.
    predicted, exact = np.array([0.0, 0.0, 1.0, 2.0])[order], np.arange(4.0)[order]
    assert agreement(predicted, exact)["rank correlation"] == pytest.approx(4.5 / np.sqrt(4.5 * 5.0))


def test_a_site_without_gradient_is_named() -> None:
    module = TIMM_PLAIN.module()
    forward = module.blocks[1].mlp.forward
    module.blocks[1].mlp.forward = lambda x: forward(x).detach()
    vit = vmi.wrap(module)
    data = {"base": TIMM_PLAIN.images(1, 1), "source": TIMM_PLAIN.images(1, 2)}
    with pytest.raises(SpecError, match=r"No gradient arrives at blocks\.1\.mlp\.post: the output does not depend on it"):
        attribution_patching(vit, data, sites=("mlp.post",), heads=(), metric="probability")


def test_what_has_no_gradient_is_named_before_the_images_are_looked_at() -> None:
    module = TIMM_PLAIN.module()
    forward = module.blocks[1].mlp.forward
    module.blocks[1].mlp.forward = lambda x: forward(x).detach()
    seen: list[int] = []
    module.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    vit = vmi.wrap(module)
    data = {"base": TIMM_PLAIN.images(6, 1), "source": TIMM_PLAIN.images(6, 2)}
    for sites, metric, what in ((["mlp.post"], "probability", "No gradient arrives at"), (["attn_out"], "rank", "has no gradient")):
        seen.clear()
        with pytest.raises(SpecError, match=what):
            attribution_patching(vit, data, sites=sites, heads=(), layers=[1], metric=metric)
        assert seen == [1, 1], "blank images"
    with pytest.raises(SpecError, match="has no gradient"):
        edge_attribution(vit, data, receivers=["logits"], metric="rank")
    assert max(seen) == 1, "the images together are not looked at"

    def changing(outputs: torch.Tensor) -> torch.Tensor:
        return outputs[:, 0] if outputs.std() > 0 else outputs.std().expand(len(outputs)) / 0

    # What blank images cannot tell is left to the images.
    assert len(attribution_patching(vit, data, sites=["attn_out"], heads=(), metric=changing, sample=0).table)


FAMILIES = ("timm/vit_base_patch16_xp_224", "timm/vit_dwee_patch16_reg1_gap_256", "BlipVisionModel", "VideoMAEModel", "MgpstrModel", "Llama4VisionModel")


@pytest.mark.parametrize("name", FAMILIES)
def test_between_images_that_hardly_differ_predictions_are_exact(name: str) -> None:
    """Blocks side by side, differential attention, videos, BERT's blocks: every family sends along its stream."""
    module = stirred(shrunk(name.removeprefix("timm/")) if name.startswith("timm/") else build(name)).eval().double()
    vit = vmi.wrap(module)
    shape = vit.layout.tokens.input_shape
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(1, *shape, generator=draw).double()
    data = {"base": images, "source": images + 1e-3 * torch.randn(images.shape, generator=draw).double()}
    weights = torch.randn(10**6, generator=draw).double()

    def numbers(outputs: torch.Tensor) -> torch.Tensor:
        return 1e3 * outputs.flatten(1) @ weights[: outputs[0].numel()]

    edges = edge_attribution(vit, data, metric=numbers, sample=40)
    assert edges.table["exact"].abs().max() > 1e-3
    assert edges.summary["error relative to effect"] < 0.01
    heads = ("z", "v", "pattern") if "blocks.0.attn.pattern" not in vit.layout.absent else ("z", "v")
    cells = attribution_patching(vit, data, metric=numbers, heads=heads, sample=40)
    assert cells.summary["error relative to effect"] < 0.01


def test_a_branch_beside_attention_and_mlp_is_named() -> None:
    vit = vmi.wrap(stirred(shrunk("xcit_nano_12_p8_224")).eval())
    shape = vit.layout.tokens.input_shape
    data = {"base": torch.randn(1, *shape), "source": torch.randn(1, *shape)}
    with pytest.raises(UnsupportedSiteError, match="something else writes into the residual stream of layers 0, 1"):
        edge_attribution(vit, data)
    senders = ["blocks.0.attn_out", "blocks.0.mlp_out"]
    result = path_patching(vit, data, senders=senders, metric=lambda outputs: outputs.flatten(1)[:, 0])
    assert result.provenance["recomputed_branches"][:2] == [0, 1]
    assert "Something besides attention and MLP writes into the stream of layers 0, 1" in result.description
    assert result.table["change"].abs().iloc[0] > 1e-4
