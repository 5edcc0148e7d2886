"""Probes, directions, steering and similarities, against the same written out with raw hooks and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vit_mechinterp as vmi
from tests.oracles import by_hand
from tests.tiny_models import HF_CLIP, N_LAYERS, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS
from vit_mechinterp.circuits.directions import mean_directions
from vit_mechinterp.circuits.probing import probing
from vit_mechinterp.circuits.representation_similarity import linear_cka, representation_similarity, rsa
from vit_mechinterp.circuits.steering import steering
from vit_mechinterp.errors import DataError, SpecError, UnsupportedSiteError

N = 24


def bright_and_dark(tiny=TIMM_PLAIN) -> dict:
    """Images of two brightnesses, labelled; every image also has a kind of its own."""
    labels = [index % 2 for index in range(N)]
    images = tiny.images(N, seed=3) + torch.tensor([0.8 * (2 * y - 1) for y in labels])[:, None, None, None]
    return {"base": images, "label": labels, "word": ["dark" if y == 0 else "light" for y in labels], "noise": [i % 3 % 2 for i in range(N)]}


@torch.no_grad()
def streams(tiny, module, images, site: str):
    found = {}

    def keep(name, value):
        found[name] = value
        return value

    by_hand(module, images, keep)
    return found[site]


def test_probes_find_what_is_there_and_hold_out_what_they_score() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    module, data = TIMM_PLAIN.module(), bright_and_dark()
    result = probing(vmi.wrap(module), data, label="word", tokens="patches", folds=3, progress=False)
    assert result.table["layer"].tolist() == list(range(N_LAYERS))
    labels = np.array(data["label"])
    for layer in range(N_LAYERS):
        x = streams(TIMM_PLAIN, module, data["base"], f"blocks.{layer}.resid_post")[:, 1:].mean(1).double().numpy()
        right = []
        for fitted, held in StratifiedKFold(3, shuffle=True, random_state=0).split(x, labels):
            scaler = StandardScaler().fit(x[fitted])
            probe = LogisticRegression(C=1.0, max_iter=2000).fit(scaler.transform(x[fitted]), labels[fitted])
            right += list(probe.predict(scaler.transform(x[held])) == labels[held])
        row = result.table.iloc[layer]
        assert np.isclose(row["accuracy"], np.mean(right))
        assert np.isclose(row["selectivity"], row["accuracy"] - row["control_accuracy"])
        weight, bias = (result.tensors[f"blocks.{layer}.resid_post.{part}"].double().numpy() for part in ("weight", "bias"))
        scaler = StandardScaler().fit(x)
        probe = LogisticRegression(C=1.0, max_iter=2000).fit(scaler.transform(x), labels)
        assert np.allclose(x @ weight.T + bias, probe.decision_function(scaler.transform(x))[:, None], atol=1e-3)
    assert result.table["accuracy"].max() > 0.9
    assert result.table["control_accuracy"].max() < 0.8
    assert result.table["chance"].iloc[0] == 0.5
    again = probing(vmi.wrap(module), data, label="word", tokens="patches", folds=3, progress=False)
    assert again.table.equals(result.table)
    assert set(result.figures()) == set(result.captions)


def test_control_labels_belong_to_the_values_of_a_column() -> None:
    module, data = TIMM_PLAIN.module(), bright_and_dark()
    # The column is the property itself: its control labels can be read just as well, so nothing is selective.
    result = probing(vmi.wrap(module), data, control_by="word", sites=["pooled"], folds=3, progress=False)
    assert result.table["accuracy"].item() == result.table["control_accuracy"].item()
    assert result.table["selectivity"].item() == 0


def test_directions_are_differences_of_means() -> None:
    module, data = TIMM_PLAIN.module(), bright_and_dark()
    result = mean_directions(vmi.wrap(module), data, tokens="patches", sites=["resid_post", "attn.z"], progress=False)
    labels = torch.tensor(data["label"])
    for layer in range(N_LAYERS):
        for site in ("resid_post", "attn.z"):
            name = f"blocks.{layer}.{site}"
            x = streams(TIMM_PLAIN, module, data["base"], name)[:, 1:].mean(1).flatten(1)
            expected = x[labels == 1].mean(0) - x[labels == 0].mean(0)
            assert torch.allclose(result.tensors[name], expected, atol=1e-5)
            row = result.table[(result.table["site"] == site) & (result.table["layer"] == layer)]
            assert np.isclose(row["norm"].item(), float(expected.norm()), rtol=1e-4)
    assert result.table["separation"].max() > 0.95
    turned = mean_directions(vmi.wrap(module), data, label="word", to="dark", tokens="patches", progress=False)
    name = "blocks.1.resid_post"
    assert torch.allclose(turned.tensors[name], -result.tensors[name], atol=1e-6)
    assert set(result.figures()) == set(result.captions)


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED], ids=lambda tiny: tiny.name)
@torch.no_grad()
def test_steering_adds_the_direction_and_nothing_else(tiny) -> None:
    module, images = tiny.module(), tiny.images(3, seed=1)
    site, alphas = "blocks.1.resid_post", (-1.5, 0.0, 2.0)
    direction = torch.randn(24, generator=torch.Generator().manual_seed(2))
    result = steering(
        vmi.wrap(module), images, {site: direction}, alphas=alphas, tokens="patches", metric=lambda o: o[:, 1] - o[:, 0],
        controls=2, progress=False,
    )  # fmt: skip
    assert len(result.table) == 9
    for row in result.table.itertuples():
        added = row.alpha * (direction if row.direction == "given" else result.tensors[f"{site}, {row.direction}"])

        def touch(name, value, added=added):
            if name != site:
                return value
            value = value.clone()
            value[:, len(tiny.prefix) :] += added
            return value

        outputs = by_hand(module, images, touch)
        clean = by_hand(module, images, lambda name, value: value)
        expected = float((outputs[:, 1] - outputs[:, 0]).mean())
        assert np.isclose(row.value, expected, atol=1e-5)
        assert np.isclose(row.change, expected - float((clean[:, 1] - clean[:, 0]).mean()), atol=1e-5)
    assert result.table["change"].abs().max() > 0.02
    assert result.table[result.table["alpha"] == 0]["change"].abs().max() < 1e-6
    assert np.isclose(float(result.tensors[f"{site}, random 0"].norm()), float(direction.norm()), rtol=1e-5)
    assert set(result.figures()) == set(result.captions)


def test_similarity_of_layers_and_models() -> None:
    here, there = TIMM_PLAIN.module(), HF_CLIP.module()
    images = TIMM_PLAIN.images(8, seed=1)
    result = representation_similarity(
        vmi.wrap(here), images, other=vmi.wrap(there), sites=["resid_post"], tokens="cls", progress=False
    )
    values = result.table.set_index(["site", "other_site"])
    for a in range(N_LAYERS):
        for b in range(N_LAYERS):
            names = f"blocks.{a}.resid_post", f"blocks.{b}.resid_post"
            x = streams(TIMM_PLAIN, here, images, names[0])[:, 0].double().numpy()
            y = streams(HF_CLIP, there, images, names[1])[:, 0].double().numpy()
            x, y = x - x.mean(0), y - y.mean(0)
            cka = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
            assert np.isclose(values.loc[names, "cka"], cka, atol=1e-4)
    assert values["cka"].between(0, 1).all()
    assert set(result.figures()) == set(result.captions)


def test_every_pair_of_sites_and_its_control_is_that_of_the_functions() -> None:
    from scipy.stats import spearmanr

    module, images = TIMM_PLAIN.module(), TIMM_PLAIN.images(30, seed=1)
    sites = ["blocks.0.resid_post", "blocks.2.mlp_out", "logits"]
    table = representation_similarity(vmi.wrap(module), images, sites=sites, tokens="cls", seed=4, progress=False).table
    order = np.random.default_rng(4).permutation(30)
    values = {site: streams(TIMM_PLAIN, module, images, site).double().numpy() for site in sites}
    values = {site: value[:, 0] if value.ndim == 3 else value for site, value in values.items()}
    assert list(zip(table["site"], table["other_site"], strict=True)) == [(a, b) for a in sites for b in sites]
    far = np.triu_indices(30, 1)
    for row in table.itertuples():
        x, y = values[row.site], values[row.other_site]
        for other, cka, ranks in ((y, row.cka, row.rsa), (y[order], row.control_cka, row.control_rsa)):
            # Once by features and once by examples, whichever of the two is fewer.
            x_c, y_c = x - x.mean(0), other - other.mean(0)
            wanted = np.linalg.norm(x_c.T @ y_c) ** 2 / np.linalg.norm(x_c @ x_c.T) / np.linalg.norm(y_c @ y_c.T)
            assert np.isclose(cka, wanted, atol=1e-5)
            wanted = spearmanr(1 - np.corrcoef(x)[far], 1 - np.corrcoef(other)[far]).statistic
            assert np.isclose(ranks, wanted, atol=2e-3)
    assert {value.shape[1] > 30 for value in values.values()} == {False}
    assert np.isclose(linear_cka(x, y), linear_cka(np.pad(x, [(0, 0), (0, 40)]), y), atol=1e-12)
    assert table["control_rsa"].abs().max() < 0.3 < table["rsa"].max()


def test_similarities_know_what_they_should_not_see() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(30, 5))
    rotation, _ = np.linalg.qr(draw.normal(size=(5, 5)))
    assert np.isclose(linear_cka(x, 3 * x @ rotation + 1), 1)
    assert linear_cka(x, draw.normal(size=(30, 5))) < 0.5
    assert np.isclose(rsa(x, 2 * x), 1)
    assert abs(rsa(x, draw.normal(size=(30, 5)))) < 0.3
    assert np.isnan(linear_cka(np.ones((30, 5)), x))
    assert np.isnan(rsa(np.ones((30, 5)), x))


def test_bad_input_is_named_first() -> None:
    vit, data = vmi.wrap(TIMM_PLAIN.module()), bright_and_dark()
    with pytest.raises(DataError, match=r"There is no column of labels 'lable'. Close matches: label"):
        probing(vit, data, label="lable")
    with pytest.raises(DataError, match=r"example 0: Tensor is no label"):
        probing(vit, data, label="base")
    with pytest.raises(DataError, match=r"All 24 examples have the label 1 in 'same'"):
        probing(vit, data | {"same": [1] * N}, label="same")
    with pytest.raises(DataError, match=r"occurs 12 times; 13 folds"):
        probing(vit, data, folds=13)
    with pytest.raises(SpecError, match=r"attn.pattern is a matrix"):
        probing(vit, data, sites="attn.pattern")
    with pytest.raises(UnsupportedSiteError, match=r"mlp.pre_linear: the MLP of this block is not gated"):
        mean_directions(vit, data, sites="mlp.pre_linear")
    with pytest.raises(DataError, match=r"No example has the label 'lihgt' in 'word'. Close matches: light"):
        mean_directions(vit, data, label="word", to="lihgt")
    with pytest.raises(SpecError, match=r"has shape \(5,\); finite numbers \[24\] fit there"):
        steering(vit, data, {"blocks.0.resid_post": torch.ones(5)})
    with pytest.raises(SpecError, match=r"at least one direction"):
        steering(vit, data, {})
    with pytest.raises(DataError, match=r"3 images are too few"):
        representation_similarity(vit, TIMM_PLAIN.images(3))
