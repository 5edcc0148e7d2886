"""Dictionaries of features: their files, their edits against the formula, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vit_mechinterp as vmi
from tests.oracles import by_hand
from tests.tiny_models import TIMM_PLAIN, TIMM_REGISTERS
from vit_mechinterp.circuits.dictionary import Dictionary
from vit_mechinterp.circuits.dictionary_files import load_dictionary
from vit_mechinterp.circuits.metrics import Probability
from vit_mechinterp.circuits.sparse_autoencoder import sparse_autoencoder
from vit_mechinterp.errors import DataError, SpecError, TensorFileError

D, N_FEATURES = 24, 40
SITE = "blocks.1.resid_post"


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return {
        "W_enc": torch.randn(D, N_FEATURES, generator=draw) / 3,
        "W_dec": torch.randn(N_FEATURES, D, generator=draw) / 3,
        "b_enc": torch.randn(N_FEATURES, generator=draw) / 3,
        "b_dec": torch.randn(D, generator=draw) / 3,
    }


def features(h: torch.Tensor, own: dict[str, torch.Tensor], k: int | None = None, threshold: float | None = None):
    pre = (h - own["b_dec"]) @ own["W_enc"] + own["b_enc"]
    if threshold is not None:
        return pre * (pre > threshold)
    found = pre.clamp(min=0)
    if k is not None:
        kept = found.sort(dim=-1, descending=True).values[..., k - 1, None]
        found = found * (found >= kept)
    return found


@pytest.mark.parametrize("layout", ["saelens", "linear", "narrow"])
def test_layouts_of_files(layout: str, tmp_path: Path) -> None:
    own = weights()
    held = dict(own)
    if layout == "linear":
        held = {
            "encoder.weight": own["W_enc"].T.contiguous(), "encoder.bias": own["b_enc"],
            "decoder.weight": own["W_dec"].T.contiguous(), "decoder.bias": own["b_dec"],
        }  # fmt: skip
    elif layout == "narrow":  # fewer features than entries: only the biases tell which axis is which
        own = {"W_enc": own["W_enc"][:, :10], "W_dec": own["W_dec"][:10], "b_enc": own["b_enc"][:10], "b_dec": own["b_dec"]}
        held = {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor.contiguous() for name, tensor in own.items()}
    save_file(held, tmp_path / "sae.safetensors")
    h = torch.randn(5, D)
    loaded = load_dictionary(tmp_path / "sae.safetensors")
    assert torch.allclose(loaded.encode(h), features(h, own), atol=1e-5)
    assert torch.allclose(loaded.decode(loaded.encode(h)), features(h, own) @ own["W_dec"] + own["b_dec"], atol=1e-4)
    (tmp_path / "cfg.json").write_text(json.dumps({"apply_b_dec_to_input": False, "k": 3}))
    other = load_dictionary(tmp_path)
    assert torch.allclose(other.encode(h), features(h + own["b_dec"], own, k=3), atol=1e-5)
    assert ((other.encode(h) > 0).sum(-1) <= 3).all()


def test_a_jump_relu_has_a_threshold(tmp_path: Path) -> None:
    own = weights()
    save_file({**own, "threshold": torch.full((N_FEATURES,), 0.7)}, tmp_path / "sae.safetensors")
    h = torch.randn(5, D)
    assert torch.allclose(load_dictionary(tmp_path).encode(h), features(h, own, threshold=0.7), atol=1e-5)


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, TIMM_REGISTERS], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("k", [None, 6])
@torch.no_grad()
def test_edits_move_a_feature_to_its_value(tiny, k: int | None, tmp_path: Path) -> None:
    module, images, own = tiny.module(), tiny.images(3, seed=1), weights()
    save_file(own, tmp_path / "sae.safetensors")
    dictionary = load_dictionary(tmp_path, k=k)
    result = sparse_autoencoder(
        vmi.wrap(module), images, dictionary, site=SITE, features=[3, 11, 20], set_to=1.5, add=0.7,
        metric=lambda outputs: outputs[:, 1] - outputs[:, 0], progress=False,
    )  # fmt: skip
    first, values = len(tiny.prefix), {}

    def keep(site, value):
        values[site] = value
        return value

    clean = by_hand(module, images, keep)
    found = features(values[SITE][:, first:], own, k)
    assert len(result.table) == 9
    for row in result.table.itertuples():
        def touch(site, value, row=row):
            if site != SITE:
                return value
            value = value.clone()
            now = features(value[:, first:], own, k)[..., row.feature, None]
            change = {"ablate": -now, "set": 1.5 - now, "add": torch.full_like(now, 0.7)}[row.edit]
            value[:, first:] += change * own["W_dec"][row.feature]
            return value

        outputs = by_hand(module, images, touch)
        change = (outputs - clean)[:, 1] - (outputs - clean)[:, 0]
        assert np.isclose(row.change, float(change.mean()), atol=1e-5)
        assert np.isclose(row.mean_activation, float(found[..., row.feature].mean()), atol=1e-5)
        assert np.isclose(row.max_activation, float(found[..., row.feature].max()), atol=1e-5)
        assert np.isclose(row.frequency, float((found[..., row.feature] > 0).float().mean()), atol=1e-6)
    assert result.table["change"].abs().max() > 1e-3
    rebuilt = found @ own["W_dec"] + own["b_dec"]
    h = values[SITE][:, first:].reshape(-1, D)
    explained = 1 - float(((h - rebuilt.reshape(-1, D)) ** 2).sum() / ((h - h.mean(0)) ** 2).sum())
    assert np.isclose(result.summary["variance explained"], explained, rtol=1e-4)
    most = result.table.loc[result.table["change"].abs().idxmax()]
    said = f"{most.change:+.3g} ({most.edit}, feature {most.feature})"
    assert result.summary["largest change"] == said
    assert set(result.figures()) == set(result.captions)


@torch.no_grad()
def test_adding_is_a_document_too(tmp_path: Path) -> None:
    tiny, own = TIMM_PLAIN, weights()
    save_file(own, tmp_path / "sae.safetensors")
    dictionary = load_dictionary(tmp_path)
    module, images = tiny.module(), tiny.images(2)
    run = vmi.Run(name="add", interventions=[dictionary.edit(SITE, 5, value=2.0, method="add", tokens="cls")])
    again = vmi.Run.model_validate_json(run.model_dump_json())
    assert again == run
    results = vmi.execute(vmi.wrap(module), [again], {"base": images}, tensors=dictionary.tensors(), progress=False)

    def touch(site, value):
        if site == SITE:
            value = value.clone()
            value[:, 0] += 2 * own["W_dec"][5]
        return value

    expected = by_hand(module, images, touch)
    assert torch.allclose(results["add"], expected, atol=1e-5)
    assert not torch.allclose(expected, by_hand(module, images, lambda site, value: value), atol=1e-3)


def test_what_is_no_dictionary_is_refused(tmp_path: Path) -> None:
    own, vit, images = weights(), vmi.wrap(TIMM_PLAIN.module()), TIMM_PLAIN.images(2)
    with pytest.raises(TensorFileError, match=r"sae.pt is a pickle, which can run code"):
        load_dictionary(tmp_path / "sae.pt")
    with pytest.raises(TensorFileError, match=r"holds 0 safetensors files"):
        load_dictionary(tmp_path)
    save_file({"W_enc": own["W_enc"]}, tmp_path / "half.safetensors")
    with pytest.raises(DataError, match=r"has no decoder \(W_dec, .*It holds: W_enc"):
        load_dictionary(tmp_path / "half.safetensors")
    save_file({f"blocks.{n}.weight": torch.zeros(1) for n in range(40)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"has no encoder and no decoder .*blocks\.0\.weight, .* and 28 more\.$"):
        load_dictionary(tmp_path / "model.safetensors")
    save_file({**own, "b_dec": torch.zeros(7)}, tmp_path / "odd.safetensors")
    with pytest.raises(DataError, match=r"these shapes make no dictionary: encoder \(24, 40\)"):
        load_dictionary(tmp_path / "odd.safetensors")
    save_file(own, tmp_path / "good.safetensors")
    good = tmp_path / "good.safetensors"
    with pytest.raises(SpecError, match=r"made for activations of 24 entries per token; blocks.0.mlp.post holds"):
        sparse_autoencoder(vit, images, good, site="blocks.0.mlp.post")
    with pytest.raises(SpecError, match=r"Feature 40 is out of range; the dictionary has features 0 to 39"):
        sparse_autoencoder(vit, images, good, site=SITE, features=[40])


GATED = {"b_gate": torch.linspace(-1, 1, N_FEATURES), "r_mag": torch.linspace(-0.5, 0.5, N_FEATURES)}


def scaled_by_hand(h: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if how == "layer_norm":
        mean, deviation = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
        return (h - mean) / (deviation + 1e-5), mean, deviation
    length = h.norm(dim=-1, keepdim=True) / D**0.5
    return h / length, torch.zeros_like(length), length


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
@torch.no_grad()
def test_dictionaries_for_scaled_activations(how: str, tmp_path: Path) -> None:
    own, tiny = weights(), TIMM_PLAIN
    save_file(own, tmp_path / "weights.safetensors")
    config = {"normalize_activations": how, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_dictionary(tmp_path)
    h = 3 * torch.randn(5, D) + 1
    x, mean, scale = scaled_by_hand(h, how)
    found = features(x, own, k=5)
    assert torch.allclose(loaded.encode(h), found, atol=1e-4)
    assert torch.allclose(loaded.rebuild(h), (found @ own["W_dec"] + own["b_dec"]) * scale + mean, atol=1e-4)

    module, images = tiny.module(), tiny.images(2)
    run = vmi.Run(name="r", interventions=[loaded.edit(SITE, 5, value=2.0)])
    results = vmi.execute(vmi.wrap(module), run, {"base": images}, tensors=loaded.tensors(), progress=False)

    def touch(site, value):
        if site != SITE:
            return value
        x, _, scale = scaled_by_hand(value, how)
        return value + (2.0 - features(x, own, k=5)[..., 5, None]) * scale * own["W_dec"][5]

    expected = by_hand(module, images, touch)
    assert torch.allclose(results["r"], expected, atol=1e-5)
    assert not torch.allclose(expected, by_hand(module, images, lambda site, value: value), atol=1e-3)


def test_gated_dictionaries(tmp_path: Path) -> None:
    own = weights()
    held = {"b_mag" if name == "b_enc" else name: tensor for name, tensor in own.items()}
    save_file({**held, **GATED}, tmp_path / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(N_FEATURES)}, tmp_path / "sparsity.safetensors")
    h = torch.randn(50, D)
    x = h - own["b_dec"]
    open_gates = x @ own["W_enc"] + GATED["b_gate"] > 0
    expected = (x @ (own["W_enc"] * GATED["r_mag"].exp()) + own["b_enc"]).clamp(min=0) * open_gates
    assert torch.allclose(load_dictionary(tmp_path).encode(h), expected, atol=1e-5)
    assert 0.1 < float((expected > 0).float().mean()) < 0.9


def test_layouts_of_overcomplete_and_dictionary_learning(tmp_path: Path) -> None:
    own, h = weights(), torch.randn(30, D)
    linear = torch.nn.Sequential(torch.nn.Linear(D, N_FEATURES), torch.nn.BatchNorm1d(N_FEATURES), torch.nn.ReLU())
    with torch.no_grad():
        for _ in range(3):
            linear(torch.randn(64, D))
        expected = linear.eval()(h)
    held = {f"encoder.final_block.{key}": tensor for key, tensor in linear.state_dict().items()}
    save_file({**held, "dictionary._weights": own["W_dec"]}, tmp_path / "over.safetensors")
    loaded = load_dictionary(tmp_path / "over.safetensors")
    assert torch.allclose(loaded.encode(h), expected, atol=1e-5)
    assert torch.allclose(loaded.decode(expected), expected @ own["W_dec"], atol=1e-5)

    square = torch.randn(D, D)  # neither shapes nor biases tell: a linear layer's weights hold outputs first
    topk = {"encoder.weight": square, "encoder.bias": torch.zeros(D), "decoder.weight": square.T.contiguous()}
    topk |= {"b_dec": own["b_dec"], "k": torch.tensor(4), "threshold": torch.tensor(0.3)}
    save_file(topk, tmp_path / "topk.safetensors")
    pre = (h - own["b_dec"]) @ square.T
    kept = pre.clamp(min=0) * (pre >= pre.sort(-1, descending=True).values[:, 3, None])
    assert torch.allclose(load_dictionary(tmp_path / "topk.safetensors").encode(h), kept, atol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE"}}))
    jumped = load_dictionary(tmp_path / "topk.safetensors").encode(h)
    assert torch.allclose(jumped, pre * (pre > 0.3), atol=1e-5)


@pytest.mark.parametrize(
    ("held", "config", "said"),
    [
        ({"b_dec_out": torch.zeros(3)}, {}, "it is a transcoder, which writes elsewhere"),
        ({}, {"architecture": "skip_transcoder"}, "it is a transcoder, which writes elsewhere"),
        ({"encoder.mlp_blocks.0.weight": torch.zeros(3)}, {}, "its encoder has several layers"),
        ({"scaling_factor": torch.full((N_FEATURES,), 2.0)}, {}, "have a scaling factor of their own"),
        ({}, {"activation_fn_str": "tanh-relu"}, "the activation 'tanh-relu' is not known"),
        ({}, {"normalize_activations": "expected_average_only_in"}, "scaled by 'expected_average_only_in'"),
        ({}, {"k": 41}, "k=41 must lie between 1 and the number of features, 40"),
    ],
)
def test_dictionaries_of_other_kinds_are_refused(held: dict, config: dict, said: str, tmp_path: Path) -> None:
    save_file({**weights(), **held}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=said):
        load_dictionary(tmp_path)


def test_documents_edit_features_without_circuits(tmp_path: Path) -> None:
    """``vit-mechinterp run`` knows the op, and what does not fit is said before the first forward."""
    import subprocess
    import sys

    code = (
        "import sys, vit_mechinterp as vmi; from vit_mechinterp.spec import OPS; assert 'edit_feature' in OPS;"
        "assert not any(name.startswith('vit_mechinterp.circuits') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    own, vit = weights(), vmi.wrap(TIMM_PLAIN.module())
    edit = {"op": "edit_feature", "site": SITE, "encoder": "e", "decoder": "d", "feature": 3}
    tensors, data = {"e": own["W_enc"], "d": own["W_dec"]}, {"base": TIMM_PLAIN.images(1)}
    refs = {"encoder": {"name": "e"}, "decoder": {"name": "d"}}

    def run(**changed) -> None:
        vmi.execute(vit, vmi.Run(name="r", interventions=[{**edit, **refs, **changed}]), data, tensors=tensors)

    run()
    with pytest.raises(SpecError, match=r"feature 40 and k=None must lie within the dictionary's 40 features"):
        run(feature=40)
    with pytest.raises(SpecError, match=r"decoder has shape \(24, 40\); the encoder is \[24, 40\], so \[40, 24\] fits"):
        run(decoder={"name": "e"})
    with pytest.raises(SpecError, match=r"encoder has shape \(24, 40\); the site holds 96 features"):
        run(site="blocks.0.mlp.post")


def test_a_metric_that_does_not_fit_is_named_before_features_are_read() -> None:
    vit, seen = vmi.wrap(TIMM_PLAIN.module()), []
    vit.module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    dictionary = Dictionary(torch.randn(D, 40), torch.randn(40, D), torch.zeros(40), torch.zeros(D))
    with pytest.raises(SpecError, match="class 9 of example 0 is out of range"):
        sparse_autoencoder(vit, TIMM_PLAIN.images(6), dictionary, site=SITE, metric=Probability(9), progress=False)
    assert set(seen) <= {1}
