"""Equivalence structures: Jacobian products against the full Jacobian, descents against plain gradient descent
written out, estimates and walks against forwards of the native module.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import nn

import vit_mechinterp as vmi
from tests.tiny_models import stirred
from vit_mechinterp.circuits import embedding_matching, equivalence_walks, local_lipschitz
from vit_mechinterp.circuits.embeddings import Embedding, default_site
from vit_mechinterp.circuits.pixels import PixelScale
from vit_mechinterp.circuits.spectrum import null_directions, singular_directions
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model import positional_attention

SIZE = 16


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3
    )
    return stirred(module).eval()


@pytest.fixture(scope="module")
def vit(module: nn.Module) -> vmi.HookedViT:
    return vmi.wrap(module)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def native(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The pooled embedding by the module's own methods."""
    return module.forward_head(module.forward_features(x), pre_logits=True)


def jacobian(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The full Jacobian ``[feature, pixels]``."""
    return torch.func.jacrev(lambda z: native(module, z[None])[0])(x).flatten(1)


def test_embeddings_are_the_models_own(vit: vmi.HookedViT, module: nn.Module, images: torch.Tensor) -> None:
    assert default_site(vit) == "pooled"
    torch.testing.assert_close(Embedding.of(vit)(images), native(module, images), rtol=0, atol=0)
    stream = module.forward_intermediates(images, indices=[0], norm=False, output_fmt="NLC")[1][0]
    chosen = Embedding.of(vit, "blocks.0.resid_post", tokens=[1, 3])(images)
    torch.testing.assert_close(chosen, stream[:, [1, 3]].flatten(1))
    for site, tokens, message in (
        ("pooled", "cls", "pooled has no axis of tokens"),
        ("blocks.0.resid_post", {"column": "a"}, "the same tokens in every image"),
        ("blocks.7.resid_post", "all", "layer 7 is out of range"),
    ):
        with pytest.raises(SpecError, match=message):
            Embedding.of(vit, site, tokens)


def test_products_with_the_jacobian_are_exact(
    vit: vmi.HookedViT, module: nn.Module, images: torch.Tensor
) -> None:
    embedding = Embedding.of(vit)
    generator = torch.Generator().manual_seed(2)
    u = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    w = torch.randn(2, 24, generator=generator)
    value, forward = embedding.jvp(images[:2], u)
    _, backward = embedding.vjp(images[:2], w)
    torch.testing.assert_close(value, native(module, images[:2]), rtol=1e-5, atol=1e-5)
    for row in range(2):
        full = jacobian(module, images[row])
        torch.testing.assert_close(forward[row], full @ u[row].flatten(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(backward[row].flatten(), w[row] @ full, rtol=1e-4, atol=1e-4)
    assert forward.abs().max() > 1e-2


def test_singular_directions_are_those_of_the_full_jacobian(
    vit: vmi.HookedViT, module: nn.Module, images: torch.Tensor
) -> None:
    found = singular_directions(Embedding.of(vit), images[0], 4, tolerance=1e-4)
    _, values, right = torch.linalg.svd(jacobian(module, images[0]), full_matrices=False)
    torch.testing.assert_close(found.values, values[:4], rtol=1e-3, atol=0)
    overlap = (found.directions.flatten(1) * right[:4]).sum(1).abs()
    assert overlap.min() > 0.999
    assert found.residuals.max() <= 1e-4
    with pytest.raises(SpecError, match="has 24 singular values, not 25"):
        singular_directions(Embedding.of(vit), images[0], 25)


def test_null_directions_lie_in_the_null_space(
    vit: vmi.HookedViT, module: nn.Module, images: torch.Tensor
) -> None:
    embedding = Embedding.of(vit)
    u = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    spectrum = singular_directions(embedding, images[0], 8)
    found, left = null_directions(embedding, images[0], u, spectrum, tolerance=1e-3, max_iterations=200)
    full = jacobian(module, images[0])
    exact = u.flatten(1) - u.flatten(1) @ torch.linalg.pinv(full) @ full
    before, after = ((full @ v.flatten(1).T).norm(dim=0) for v in (u, found))
    assert (after / before).max() < 5e-3
    torch.testing.assert_close(left, after / before, rtol=0.2, atol=1e-4)
    assert ((found.flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.02


def test_an_ill_conditioned_jacobian_has_its_null_space_found(
    vit: vmi.HookedViT, module: nn.Module, images: torch.Tensor
) -> None:
    """The iteration goes on until the whole embedding is spanned, and what is left is rounding."""
    embedding = Embedding.of(vit)
    _, values, right = torch.linalg.svd(jacobian(module, images[1]).double(), full_matrices=False)
    # The layer norm at the end takes directions away for good; what they are is left to rounding.
    kept = right[values > 1e-5 * values[0]]
    assert 2 < len(kept) < 24
    u = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    spectrum = singular_directions(embedding, images[1], 2, extra=0, tolerance=0.1)
    found, left = null_directions(embedding, images[1], u, spectrum, tolerance=1e-3)
    assert left.max() < 1e-3
    exact = u.flatten(1).double() - (u.flatten(1).double() @ kept.T) @ kept
    torch.testing.assert_close(found.flatten(1).double(), exact, rtol=0, atol=5e-3)
    assert spectrum.residuals.max() <= 0.1


@pytest.mark.parametrize("loss", ["half_squared", "mean_squared"])
def test_a_fixed_step_is_plain_gradient_descent(
    vit: vmi.HookedViT, module: nn.Module, images: torch.Tensor, loss: Any
) -> None:
    pairs = {"base": images[:2], "source": images[2:]}
    result = embedding_matching(
        vit, pairs, loss=loss, step_size=0.5, max_steps=6, value_range=(-2.0, 2.0), record_every=1, progress=False
    )
    wanted = native(module, images[2:]).detach()
    x = images[:2].clone()
    for step in range(7):
        leaf = x.clone().requires_grad_()
        squared = ((native(module, leaf) - wanted) ** 2).sum(1)
        rows = result.table[result.table["step"] == step].sort_values("pair")
        np.testing.assert_allclose(rows["squared_distance"], squared.detach(), rtol=1e-4)
        if step < 6:
            value = 0.5 * squared.sum() if loss == "half_squared" else squared.sum() / 24
            (gradient,) = torch.autograd.grad(value, leaf)
            x = (x - 0.5 * gradient).clamp(-2.0, 2.0)
    torch.testing.assert_close(result.tensors["matched"], x, rtol=1e-4, atol=1e-5)
    assert (result.tensors["matched"] - images[:2]).abs().max() > 1e-2
    torch.testing.assert_close(result.tensors["base"], images[:2], rtol=0, atol=0)


def test_an_adaptive_descent_goes_down_and_stops_pair_by_pair(
    vit: vmi.HookedViT, module: nn.Module, images: torch.Tensor
) -> None:
    pairs = {"base": images[:3], "source": torch.stack([images[0], images[3], images[2].flip(-1)])}
    result = embedding_matching(vit, pairs, max_steps=400, record_every=1, batch_size=2, progress=False)
    for pair, own in result.table.groupby("pair"):
        # It may rise for a moment, but never above all of its last five losses.
        recent = own["squared_distance"].shift().rolling(5, min_periods=1).max()
        assert (own["squared_distance"] <= recent)[1:].all(), pair
        assert own["final"].sum() == 1
        assert own["final"].iloc[-1]
    last = result.table[result.table["final"]].set_index("pair")
    assert last["step"][0] == 0
    assert last["matched"].all()
    assert last["step"][1] != last["step"][2]
    found = native(module, result.tensors["matched"]).detach()
    wanted = native(module, pairs["source"]).detach()
    cosine = torch.nn.functional.cosine_similarity(found, wanted)
    np.testing.assert_allclose(last["cosine"], cosine, atol=1e-5)
    assert (cosine >= 0.97).all()
    low, high = images[:3].flatten(1).amin(1), images[:3].flatten(1).amax(1)
    matched = result.tensors["matched"].flatten(1)
    assert (matched.amin(1) >= low - 1e-6).all()
    assert (matched.amax(1) <= high + 1e-6).all()
    np.testing.assert_array_equal(last["prediction"], module(result.tensors["matched"]).argmax(-1))
    assert set(result.figures()) == {"pairs", "trajectories"}


def test_a_bound_holds_and_psnr_is_by_hand(vit: vmi.HookedViT, images: torch.Tensor) -> None:
    pairs = {"base": images[:1], "source": images[1:2]}
    result = embedding_matching(vit, pairs, bound=0.05, max_steps=20, progress=False)
    change = result.tensors["matched"] - images[:1]
    assert 0.01 < change.abs().max() <= 0.05 + 1e-6
    low, high = images[:1].min(), images[:1].max()
    last = result.table.iloc[-1]
    expected = -10 * np.log10(float(((change / (high - low)) ** 2).mean()))
    assert last["psnr"] == pytest.approx(expected, rel=1e-4)
    assert last["max_change"] == pytest.approx(float(change.abs().max() / (high - low)), rel=1e-4)


def test_a_model_in_bfloat16_is_matched_and_measured(module: nn.Module, images: torch.Tensor) -> None:
    vit = vmi.wrap(copy.deepcopy(module).to(torch.bfloat16))
    result = embedding_matching(vit, {"base": images[:2], "source": images[2:]}, max_steps=60, progress=False)
    assert result.tensors["matched"].dtype == torch.float32
    with torch.no_grad():
        found, wanted = (native(module, x) for x in (result.tensors["matched"], images[2:]))
        start = native(module, images[:2])
    # What the coarse model takes for a match is one for the same weights in float32.
    assert ((found - wanted).norm(dim=1) < 0.3 * (start - wanted).norm(dim=1)).all()
    table = local_lipschitz(vit, images[:2], n_directions=2, n_singular=2, progress=False).table
    assert sorted(table["scale"].unique()) == [0, 0.03, 0.1, 0.3]
    tops = table[(table["kind"] == "singular") & (table["direction"] == 0) & (table["scale"] == 0)]
    largest = [float(torch.linalg.matrix_norm(jacobian(module, x).detach(), 2)) for x in images[:2]]
    np.testing.assert_allclose(tops.sort_values("image")["estimate"], largest, rtol=0.05)
    walks = equivalence_walks(vit, result, n_directions=1, progress=False)
    assert np.isfinite(walks.table["drift"]).all()
    with pytest.raises(SpecError, match=r"rounds steps below 0.02 of an image away"):
        local_lipschitz(vit, images[:2], scales=(1e-3,))


def test_videos_are_matched_and_drawn() -> None:
    config = transformers.VideoMAEConfig(
        image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, num_frames=4,
    )  # fmt: skip
    vit = vmi.wrap(stirred(transformers.VideoMAEForVideoClassification(config)).eval())
    x = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    result = embedding_matching(vit, {"base": x[:1], "source": x[1:]}, max_steps=3, progress=False)
    assert result.table["squared_distance"].iloc[-1] < result.table["squared_distance"].iloc[0]
    assert "the first frame" in result.captions["pairs"]
    assert set(result.figures()) == {"pairs", "trajectories"}


def test_a_site_that_no_image_reaches_is_matched_from_the_start(images: torch.Tensor) -> None:
    config = transformers.ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    vit = vmi.wrap(positional_attention(transformers.ViTForImageClassification(config).eval()))
    pairs = {"base": images[:1], "source": images[1:2]}
    result = embedding_matching(vit, pairs, site="blocks.0.attn.pattern", progress=False)
    assert result.table[["step", "matched"]].to_numpy().tolist() == [[0, True]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": -1.0}, "step_size is 'adaptive' or a positive number"),
        ({"max_steps": 0}, "make at least one step"),
        ({"bound": 0.0}, "the largest change is positive"),
        ({"value_range": (1.0, 1.0)}, "the lowest value comes before the highest"),
        ({"site": "blocks.0.nothing"}, "blocks.0.nothing"),
        ({"loss": "squared"}, "loss='squared' is not known"),
        ({"value_range": "pixels"}, r"value_range is 'base', None or \(lowest, highest\)"),
        ({"stop_cosine": 1.5}, "a cosine lies between -1 and 1"),
        ({"batch_size": 0}, "are at least 1"),
    ],
)
def test_bad_settings_are_named(
    vit: vmi.HookedViT, images: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        embedding_matching(vit, {"base": images[:1], "source": images[1:2]}, **options)


def test_pixel_scales_invert_the_models_normalisation() -> None:
    vit = vmi.load("vmi/discrimination-disentangled")
    picture = vmi.stimuli.discrimination("test", 1, canvas=128, patch=16, cell=32, progress=False)[0]["base"]
    x = vit.preprocess([picture])
    scale = PixelScale.of(vit, x)
    np.testing.assert_array_equal(np.asarray(scale.image(x[0])), np.asarray(picture))
    torch.testing.assert_close(scale.change(x), x * 0.5)


def test_lipschitz_estimates_are_ratios_of_native_forwards(
    vit: vmi.HookedViT, module: nn.Module, images: torch.Tensor
) -> None:
    data = {"base": images, "label": [0, 1, 0, 1]}
    result = local_lipschitz(
        vit, data, scales=(1e-2, 0.3), n_directions=2, n_singular=3, progress=False
    )
    table = result.table
    full = [jacobian(module, x) for x in images]
    tops = table[(table["kind"] == "singular") & (table["direction"] == 0) & (table["scale"] == 0)]
    largest = [float(torch.linalg.matrix_norm(j, 2)) for j in full]
    np.testing.assert_allclose(tops.sort_values("image")["estimate"], largest, rtol=1e-2)
    np.testing.assert_allclose(tops.sort_values("image")["value"], largest, rtol=1e-2)

    # Image 0 is "different", so the directions between classes lead to images 1 and 3, in some order.
    found = table[(table["kind"] == "between") & (table["image"] == 0)]
    for scale, own in found.groupby("scale"):
        expected = []
        for other in (1, 3):
            u = (images[other] - images[0]) / (images[other] - images[0]).norm()
            step = scale * float(images[0].norm())
            if scale == 0:
                expected.append(float((full[0] @ u.flatten()).norm()))
            else:
                moved = native(module, (images[0] + step * u)[None]) - native(module, images[:1])
                expected.append(float(moved.norm()) / step)
        np.testing.assert_allclose(sorted(own["estimate"]), sorted(expected), rtol=2e-2)
    limits = table[table["scale"] == 0].groupby("kind")["estimate"].median()
    assert limits["singular"] > limits["random"] > 5 * limits["null"]
    assert set(result.figures()) == {"lipschitz", "spectra"}
    with pytest.raises(DataError, match="at least two images"):
        local_lipschitz(vit, images[:1])
    with pytest.raises(SpecError, match="steps have a positive length"):
        local_lipschitz(vit, images, scales=(0.0,))


def test_walks_measure_drift_departure_and_class(
    vit: vmi.HookedViT, module: nn.Module, images: torch.Tensor
) -> None:
    pairs = {"base": images[:2], "source": torch.stack([images[3], images[3]])}
    matching = embedding_matching(vit, pairs, max_steps=60, progress=False)
    result = equivalence_walks(vit, matching, lengths=(0.01, 1.0), shares=(0.0, 0.25, 1.0), progress=False)
    table = result.table
    matched = matching.tensors["matched"]
    ends = {
        "image to match": (images[0], matched[0]),
        "match to target": (matched[0], images[3]),
        "image to target": (images[0], images[3]),
        "match to match": (matched[0], matched[1]),
    }
    for line, (a, b) in ends.items():
        own = table[(table["walk"] == line) & (table["pair"] == 0)].set_index("place")
        value = native(module, torch.stack([a, 0.75 * a + 0.25 * b, b])).detach()
        departure = (value[1] - (0.75 * value[0] + 0.25 * value[2])).norm() / value[0].norm()
        drift = (value[1] - value[0]).norm() / value[0].norm()
        assert own["departure"][0.25] == pytest.approx(float(departure), rel=1e-3, abs=1e-5)
        assert own["drift"][0.25] == pytest.approx(float(drift), rel=1e-3, abs=1e-5)
        assert own["departure"][1.0] == pytest.approx(0, abs=1e-5)
        answers = module(torch.stack([a, b])).argmax(-1)
        assert own["same_class"][1.0] == bool(answers[0] == answers[1])
    # Lengths to a drift by hand: two places alone, and the drift between them.
    near, far = (table[(table["walk"] == "random") & (table["place"] == place)] for place in (0.01, 1.0))
    keys = ["pair", "direction", "way"]
    both = near.merge(far, on=keys, suffixes=("", "_far"))
    assert len(both) == 2 * 2 * 2
    assert (both["drift"] < 0.1).all()
    share = np.log(0.1 / both["drift"]) / np.log(both["drift_far"] / both["drift"])
    reach = np.exp(np.where(both["drift_far"] > 0.1, np.log(0.01) * (1 - share), 0).mean())
    assert result.summary["length to a drift of 10%, random"] == pytest.approx(reach, rel=1e-6)
    small = table[table["place"] == 0.01].groupby("walk")["drift"].mean()
    assert small["singular"] > small["random"] > small["null"]
    assert set(result.figures()) == {"drift", "reach", "lines"} == set(result.captions)
    with pytest.raises(SpecError, match="matched at pooled, and the walks would read"):
        equivalence_walks(vit, matching, site="blocks.1.resid_post")
    with pytest.raises(SpecError, match="are positive, shares="):
        equivalence_walks(vit, matching, lengths=(0.0,))
    with pytest.raises(DataError, match="holds no base and no target and no matched images"):
        equivalence_walks(vit, local_lipschitz(vit, images, n_directions=1, n_singular=1, progress=False))
