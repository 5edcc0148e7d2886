"""Path patching against a model of whole numbers, and every path of real blocks against forwards written by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import vit_mechinterp as vmi
from tests.circuits.integer_vit import integer_images, integer_vit
from tests.oracles import by_hand
from tests.tiny_models import HF_DINOV2, HF_VIT, N_LAYERS, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS
from vit_mechinterp.circuits.nodes import Node, frozen_sites, reaches
from vit_mechinterp.circuits.path_patching import edge_patching, path_patching
from vit_mechinterp.errors import SpecError

N = 2


def first(outputs: torch.Tensor) -> torch.Tensor:
    return outputs[:, 0]


def second(outputs: torch.Tensor) -> torch.Tensor:
    return outputs[:, 1]


def changes(result) -> dict[str, float]:
    return {f"{row['sender']} -> {row['receiver']}": row["change"] for row in result.table.to_dict("records")}


BASE, SOURCE = (1, 2, 3), (5, 1, 2)
A, B, C = (there - here for here, there in zip(BASE, SOURCE, strict=True))
DIRECT = {
    "embed -> logits": A,
    "0.0 head -> logits": 0,
    "0.1 head -> logits": 0,
    "0 mlp -> logits": 0,
    "1.0 head -> logits": 5 * A,
    "1.1 head -> logits": B + 3 * A,
    "1 mlp -> logits": C + 2 * B,
}
EDGES = DIRECT | {
    "embed -> 0.0 v": 5 * A + 3 * A,
    "embed -> 0.1 v": 2 * B,
    "embed -> 0 mlp": 0,
    "embed -> 1.0 v": 0,
    "embed -> 1.1 v": B,
    "embed -> 1 mlp": C,
    "0.0 head -> 0 mlp": 3 * A,
    "0.1 head -> 0 mlp": 0,
    "0.0 head -> 1.0 v": 5 * A,
    "0.0 head -> 1.1 v": 0,
    "0.1 head -> 1.0 v": 0,
    "0.1 head -> 1.1 v": 0,
    "0 mlp -> 1.0 v": 0,
    "0 mlp -> 1.1 v": 3 * A,
    "0.0 head -> 1 mlp": 0,
    "0.1 head -> 1 mlp": 2 * B,
    "0 mlp -> 1 mlp": 0,
    "1.0 head -> 1 mlp": 0,
    "1.1 head -> 1 mlp": 0,
}


def test_every_edge_of_a_model_of_whole_numbers() -> None:
    module, data = integer_vit(), integer_images()
    logits = {name: module(images)[0].tolist() for name, images in data.items()}
    assert logits == {"base": [9 * 1 + 3 * 2 + 3, 7], "source": [9 * 5 + 3 * 1 + 2, 35]}
    result = edge_patching(vmi.wrap(module), data, metric=first)
    found = changes(result)
    queries_and_keys = {path for path in found if path.endswith((" q", " k"))}
    assert {path: found[path] for path in EDGES} == EDGES
    assert all(found[path] == 0 for path in queries_and_keys)
    assert set(found) == {*EDGES, *queries_and_keys, "control: everything held, nothing sent -> logits"}
    assert found["control: everything held, nothing sent -> logits"] == 0
    # Nothing in this model bends between two senders, so the direct effects add up to the whole difference.
    assert sum(found[path] for path in DIRECT) == logits["source"][0] - logits["base"][0]
    other = changes(edge_patching(vmi.wrap(module), data, metric=second))
    assert {path for path, change in other.items() if change} == {"0.0 head -> logits", "embed -> 0.0 v"}
    assert other["0.0 head -> logits"] == 7 * A


def test_paths_through_mlps_count_where_mlps_are_recomputed() -> None:
    vit, data = vmi.wrap(integer_vit()), integer_images()
    options = {"receivers": [("blocks.1.attn.v", 1), "logits"], "metric": first, "senders": [("blocks.0.attn.z", 0), ("blocks.0.attn.z", 1)]}
    frozen = changes(path_patching(vit, data, **options))
    through = changes(path_patching(vit, data, mlps="recomputed", **options))
    assert (frozen["0.0 head -> 1.1 v"], through["0.0 head -> 1.1 v"]) == (0, 3 * A)
    assert (frozen["0.1 head -> logits"], through["0.1 head -> logits"]) == (0, 2 * B)
    totals = path_patching(vit, data, **options).table.set_index("sender")["total"]
    assert float(totals["0.0 head"].iloc[0]) == 8 * A
    assert float(totals["0.1 head"].iloc[0]) == 2 * B


def test_denoising_sends_the_clean_value_through_the_other_forward() -> None:
    found = changes(edge_patching(vmi.wrap(integer_vit()), integer_images(), metric=first, direction="denoising"))
    assert {path: found[path] for path in EDGES} == {path: -change for path, change in EDGES.items()}


@torch.no_grad()
def by_two_forwards(module, tiny, data, sender: Node, receiver: Node, mlps: bool) -> torch.Tensor:
    """The sender's forward with everything later held, then the receiver's, by hand."""
    clean, other, sent = {}, {}, {}
    for images, values in ((data["base"], clean), (data["source"], other)):
        by_hand(module, images, lambda site, value, values=values: values.setdefault(site, value))
    start = -1 if sender.layer is None else sender.layer

    def write(value, head, new):
        value = value.clone()
        if head is None:
            value[:] = new
        else:
            value[:, :, head] = new[:, :, head]
        return value

    def sending(site, value):
        if site == sender.site:
            value = write(value, sender.head, other[site])
        elif site.startswith("blocks"):
            layer, name = int(site.split(".")[1]), site.split(".", 2)[2]
            if layer > start and name == "attn.z":
                value = clean[site]
            if mlps and name == "mlp_out" and (layer > start or (layer == start and not sender.site.endswith("mlp_out"))):
                value = clean[site]
        return sent.setdefault(site, value)

    output = by_hand(module, data["base"], sending)
    if receiver.site == "logits":
        return output
    return by_hand(module, data["base"], lambda site, value: write(value, receiver.head, sent[site]) if site == receiver.site else value)


@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
@pytest.mark.parametrize("tiny", [TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED, HF_VIT, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_every_path_is_the_hand_made_one(tiny, mlps) -> None:
    module = tiny.module()
    data = {"base": tiny.images(N, seed=1), "source": tiny.images(N, seed=2)}
    last = N_LAYERS - 1
    senders = ["embed", ("blocks.0.attn.z", 1), "blocks.0.mlp_out", ("blocks.1.attn.z", 0), "blocks.1.attn.z", f"blocks.{last}.mlp_out"]
    receivers = [(f"blocks.{last}.attn.{name}", head) for name in "qkv" for head in range(tiny.n_heads)]
    receivers += ["blocks.0.mlp", f"blocks.{last}.mlp", "blocks.1.attn.q", "logits"]
    vit = vmi.wrap(module)
    table = path_patching(vit, data, senders=senders, receivers=receivers, mlps=mlps, metric=first).table
    with torch.no_grad():
        clean = first(by_hand(module, data["base"], lambda site, value: value))
        there = first(by_hand(module, data["source"], lambda site, value: value))
    moved = 0
    for row in table.to_dict("records")[:-1]:
        layer, kind, at = row["sender_layer"], row["receiver_kind"], row["receiver_layer"]
        site = {"embed": "embed", "head": f"blocks.{layer}.attn.z", "mlp": f"blocks.{layer}.mlp_out"}[row["sender_kind"]]
        where = {"logits": "logits", "mlp": f"blocks.{at}.mlp.post"}.get(kind, f"blocks.{at}.attn.{kind}")
        heads = [None if pd.isna(row[f"{role}_head"]) else int(row[f"{role}_head"]) for role in ("sender", "receiver")]
        nodes = Node(site, heads[0]), Node(where, heads[1])
        wanted = first(by_two_forwards(module, tiny, data, *nodes, mlps == "frozen"))
        assert row["value"] == pytest.approx(float(wanted.double().mean()), abs=3e-5), (row["sender"], row["receiver"])
        change = float((wanted - clean).mean())
        if not row["reason"]:
            assert row["normalised"] == pytest.approx(change / float((there - clean).mean()), abs=1e-3)
        moved += abs(change) > 1e-3
    assert moved > 0.7 * len(table)
    assert abs(table["change"].iloc[-1]) < 1e-5


def test_which_sender_reaches_which_receiver() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    head, mlp = Node("blocks.1.attn.z", 0), Node("blocks.1.mlp_out")
    assert reaches(vit, head, Node("blocks.1.mlp.post"))
    assert not reaches(vit, mlp, Node("blocks.1.mlp.post"))
    assert not reaches(vit, head, Node("blocks.1.attn.q", 0))
    assert reaches(vit, mlp, Node("blocks.2.attn.q", 0))
    assert frozen_sites(vit, head) == ["blocks.1.mlp_out", "blocks.2.attn.z", "blocks.2.mlp_out"]
    assert frozen_sites(vit, mlp, mlps=False) == ["blocks.2.attn.z"]
    result = edge_patching(vit, {"base": TIMM_PLAIN.images(1, 1), "source": TIMM_PLAIN.images(1, 2)}, metric=first)
    heads, layers = TIMM_PLAIN.n_heads, N_LAYERS
    into = {"embed": layers * (3 * heads + 1) + 1}
    expected = into["embed"] + sum(
        (heads + 1) * ((layers - 1 - n) * (3 * heads + 1) + 1) + heads for n in range(layers)
    )
    assert len(result.table) == expected + 1
    assert set(result.figures()) == set(result.captions) == {"edges"}


def test_figures_lay_senders_out_by_layer() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    data = {"base": TIMM_PLAIN.images(3, 1), "source": TIMM_PLAIN.images(3, 2)}
    result = path_patching(vit, data, metric=lambda outputs: outputs[:, 0] ** 2)
    figures = result.figures()
    assert set(figures) == set(result.captions) == {"into_logits", "total"}
    shown = np.asarray(figures["total"].axes[0].images[0].get_array())
    assert shown.shape == (TIMM_PLAIN.n_heads + 1, N_LAYERS)
    rows = result.table[result.table["sender_kind"] == "mlp"]
    assert result.table["normalised"].isna().all()
    np.testing.assert_allclose(shown[-1], rows["total"])
    assert [t.get_text() for t in figures["total"].axes[0].get_yticklabels()] == ["head 0", "head 1", "head 2", "MLP"]


def test_direct_and_total_effects_are_drawn_in_one_unit() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    data = {"base": TIMM_PLAIN.images(1, 1), "source": TIMM_PLAIN.images(1, 2)}
    result = path_patching(vit, data, metric=first)
    with torch.no_grad():
        base, source = (float(vit(data[name])[0, 0]) for name in ("base", "source"))
    assert result.captions["total"].startswith("Share of the gap when")
    rows = result.table[result.table["sender_kind"] == "mlp"]
    for column, figure in (("change", "into_logits"), ("total", "total")):
        shown = np.asarray(result.figures()[figure].axes[0].images[0].get_array())[-1]
        np.testing.assert_allclose(shown, rows[column] / (source - base), rtol=1e-5)
    assert rows["total"].abs().max() > 1e-3


def test_bad_nodes_are_named() -> None:
    vit, data = vmi.wrap(TIMM_PLAIN.module()), {"base": TIMM_PLAIN.images(1), "source": TIMM_PLAIN.images(1, 1)}
    with pytest.raises(SpecError, match=r"blocks\.0\.attn\.q writes nothing into the residual stream"):
        path_patching(vit, data, senders=["blocks.0.attn.q"])
    with pytest.raises(SpecError, match=r"blocks\.0\.resid_post is no place where the residual stream is read"):
        path_patching(vit, data, receivers=["blocks.0.resid_post"])
    with pytest.raises(SpecError, match=r"blocks\.0\.attn\.z has heads 0 to 2; there is no head 3"):
        path_patching(vit, data, senders=[("blocks.0.attn.z", 3)])
    with pytest.raises(SpecError, match="there is no path"):
        path_patching(vit, data, senders=["blocks.2.mlp_out"], receivers=["blocks.1.mlp"])
    with pytest.raises(SpecError, match="mlps='skipped' is not known"):
        path_patching(vit, data, mlps="skipped")
    with pytest.raises(SpecError, match="layer 7 is out of range"):
        path_patching(vit, data, senders=["blocks.7.mlp_out"])
