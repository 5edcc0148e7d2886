"""Metrics against formulas written out, and what is refused before the work starts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import vit_mechinterp as vmi
from tests.tiny_models import HF_CLIP, TIMM_PLAIN
from vit_mechinterp import circuits
from vit_mechinterp.circuits.bound_metric import bind_metric, check_metric
from vit_mechinterp.circuits.metrics import (
    Accuracy,
    KLDivergence,
    LogitDifference,
    Probability,
    Rank,
    Similarity,
)
from vit_mechinterp.circuits.statistics import bootstrap_interval, bootstrap_ratio, sign_flip_p_values
from vit_mechinterp.errors import DataError, SpecError

N = 4
OUTPUTS = torch.randn(3, N, 5, generator=torch.Generator().manual_seed(3)) * 2
CLEAN, CORRUPTED, PATCHED = OUTPUTS


def bound(metric, **columns):
    vit = vmi.wrap(TIMM_PLAIN.module())
    data = {"base": TIMM_PLAIN.images(N), **columns}
    return bind_metric(check_metric(metric, vit, data), vit, data, CLEAN, CORRUPTED)


def probabilities(row) -> list[float]:
    weights = [math.exp(float(x)) for x in row]
    return [w / sum(weights) for w in weights]


def test_metrics_equal_their_formulas() -> None:
    label = [1, 0, 4, 2]
    found = {
        "difference": bound(LogitDifference(answer="label", other=3), label=label),
        "default": bound(None),
        "probability": bound(Probability(answer="label"), label=label),
        "log": bound("log_probability"),
        "kl": bound("kl"),
        "rank": bound(Rank(answer=2)),
        "accuracy": bound(Accuracy("label"), label=label),
        "cosine": bound(Similarity()),
    }
    for i in range(N):
        row, clean, other = PATCHED[i].double(), CLEAN[i].double(), CORRUPTED[i]
        top = max(range(5), key=lambda c: float(clean[c]))
        rival = max((c for c in range(5) if c != top), key=lambda c: float(other[c]))
        p, q = probabilities(row), probabilities(clean)
        wanted = {
            "difference": float(row[label[i]] - row[3]),
            "default": float(row[top] - row[rival]),
            "probability": p[label[i]],
            "log": math.log(p[top]),
            "kl": sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
            "rank": sum(float(x) > float(row[2]) for x in row),
            "accuracy": float(max(range(5), key=lambda c: float(row[c])) == label[i]),
            "cosine": float((row * clean).sum() / row.norm() / clean.norm()),
        }
        for name, metric in found.items():
            assert float(metric(PATCHED)[i]) == pytest.approx(wanted[name], abs=1e-5), name
    assert torch.equal(found["difference"].clean, found["difference"](CLEAN))
    assert torch.equal(found["difference"].other, found["difference"](CORRUPTED))
    assert float(found["kl"].clean.abs().max()) < 1e-12


def test_without_a_comparison_the_rival_is_the_clean_runner_up() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    data = {"base": TIMM_PLAIN.images(N)}
    metric = bind_metric(LogitDifference(), vit, data, CLEAN)
    ordered = CLEAN.sort(dim=1, descending=True).values
    assert torch.allclose(metric.clean, (ordered[:, 0] - ordered[:, 1]).double())
    assert metric.other is None


def test_functions_are_metrics_and_features_have_a_default() -> None:
    metric = bound(lambda outputs: outputs[:, 2] ** 2)
    assert torch.allclose(metric(PATCHED), PATCHED[:, 2].double() ** 2)

    def margin(outputs):
        return outputs.max(dim=1).values

    assert bound(margin).name == "margin"
    clip = vmi.wrap(HF_CLIP.module())
    assert check_metric(None, clip, {"base": HF_CLIP.images(1)}) == Similarity()
    assert isinstance(check_metric("kl", clip, {"base": HF_CLIP.images(1)}), KLDivergence)


def test_classes_may_be_numbers_of_numpy_and_torch() -> None:
    for two in (np.int64(2), torch.tensor(2), np.full(N, 2), torch.full((N,), 2)):
        found = bound(Probability(two))
        torch.testing.assert_close(found(PATCHED), bound(Probability(2))(PATCHED))
    assert bound(Probability(torch.tensor(2))).description == bound(Probability(2)).description
    for none in (2.0, [0, 1, 2.5, 3]):
        with pytest.raises(SpecError, match=r"answer=.* is no class: give a number, the name of a column"):
            bound(Probability(none))


def test_functions_may_give_whole_numbers() -> None:
    found = bound(lambda outputs: outputs.argmax(1))
    assert found(PATCHED).tolist() == [float(row.argmax()) for row in PATCHED]
    assert found(PATCHED).dtype == torch.float64


def test_bad_metrics_are_named_before_the_work() -> None:
    with pytest.raises(SpecError, match=r"There is no metric 'logit_diff'. Close matches: logit_difference"):
        bound("logit_diff")
    with pytest.raises(SpecError, match=r"answer: class 5 of example 0 is out of range; the model has classes 0 to 4"):
        bound(LogitDifference(answer=5))
    with pytest.raises(SpecError, match=r"other: class -1 of example 2 is out of range"):
        bound(LogitDifference(other=[0, 1, -1, 2]))
    with pytest.raises(SpecError, match="names 2 classes for 4 examples"):
        bound(Probability(answer=[0, 1]))
    with pytest.raises(DataError, match=r"no column 'labels'\. Close matches: label"):
        bound(Rank(answer="labels"), label=[0] * N)
    with pytest.raises(SpecError, match="compares class 3 with itself in example 1"):
        bound(LogitDifference(answer=[0, 3, 1, 1], other=3))
    with pytest.raises(SpecError, match=r"gives nan on the clean image of example 0"):
        bound(lambda outputs: outputs[:, 0] * float("nan"))
    with pytest.raises(SpecError, match=r"one number per example, \(4,\); on the clean images it gives shape \(5,\)"):
        bound(lambda outputs: outputs.mean(dim=0))
    with pytest.raises(SpecError, match="gives float"):
        bound(lambda outputs: 1.0)
    with pytest.raises(SpecError, match=r"fails on the clean images' outputs \(4, 5\): IndexError"):
        bound(lambda outputs: outputs[:, 9])
    with pytest.raises(SpecError, match="not 3"):
        bound(3)
    features = vmi.wrap(TIMM_PLAIN.module())
    features.module.head = torch.nn.Identity()
    features.module.global_pool = ""
    with pytest.raises(SpecError, match="needs one output per class"):
        check_metric("kl", vmi.wrap(features.module), {"base": TIMM_PLAIN.images(1)})


def test_a_metric_that_is_no_number_behind_any_edit_still_gives_its_table() -> None:
    vit, images = vmi.wrap(TIMM_PLAIN.module()), TIMM_PLAIN.images(2)
    data = {"base": images, "source": TIMM_PLAIN.images(2, seed=1)}
    with torch.no_grad():
        known = torch.cat([vit(data[name]) for name in data])

    def fussy(outputs: torch.Tensor) -> torch.Tensor:
        near = torch.cdist(outputs.float(), known).min(dim=1).values < 1e-4
        return torch.where(near, outputs[:, 0], torch.nan)

    options = {"metric": fussy, "progress": False}
    for result in (
        circuits.activation_patching(vit, data, sites=["attn_out"], **options),
        circuits.path_patching(vit, data, **options),
        circuits.ablation_sweep(vit, {"base": images}, methods=["mean"], parts=["heads"], **options),
        circuits.cumulative_ablation(vit, {"base": images}, random_orders=1, **options),
    ):
        assert result.table["change"].isna().mean() > 0.4
        assert set(result.figures()) == set(result.captions)


def test_p_values_are_those_of_all_sign_flips() -> None:
    changes = np.random.default_rng(0).normal(size=(4, 7)) + np.array([[0.0], [0.8], [2.0], [-2.0]])
    changes = np.vstack([changes, np.zeros(7)])
    alone, corrected = sign_flip_p_values(changes)
    signs = list(itertools.product([1, -1], repeat=7))
    size = [math.sqrt(sum(x * x for x in row)) or 1.0 for row in changes]
    found = [[abs(sum(s * x for s, x in zip(flip, row, strict=True))) / d for row, d in zip(changes, size, strict=True)] for flip in signs]
    for k in range(5):
        observed = found[0][k] - 1e-9
        assert alone[k] == pytest.approx(sum(row[k] >= observed for row in found) / len(signs))
        assert corrected[k] == pytest.approx(sum(max(row) >= observed for row in found) / len(signs))
    assert alone[2] <= 2 / 2**7 * 2
    assert alone[4] == corrected[4] == 1
    assert (corrected >= alone).all()
    drawn, _ = sign_flip_p_values(changes, resamples=100, seed=1)
    np.testing.assert_allclose(drawn, alone, atol=0.15)
    assert np.isnan(sign_flip_p_values(changes[:, :1])[0]).all()


def test_ratios_resample_above_and_below_together() -> None:
    draw = np.random.default_rng(0)
    below = draw.normal(3, 1, 50)
    above = np.stack([0.5 * below, below + draw.normal(0, 1, 50)])
    low, high = bootstrap_ratio(above, below, resamples=4000)
    assert low[0] == pytest.approx(0.5)
    assert high[0] == pytest.approx(0.5)
    picks = [np.random.default_rng(s).integers(0, 50, 50) for s in range(4000)]
    ratios = [above[1, p].mean() / below[p].mean() for p in picks]
    assert (low[1], high[1]) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), abs=0.02)
    ones = bootstrap_interval(above, seed=0)
    np.testing.assert_allclose(bootstrap_ratio(above, np.ones(50), seed=0), ones)
    assert np.isnan(bootstrap_ratio(above, np.zeros(50))[0]).all()
