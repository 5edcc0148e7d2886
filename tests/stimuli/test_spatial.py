"""Spatially structured data: means and covariances of the classes against their closed forms, and the sets themselves."""

from __future__ import annotations

import math

import pytest
import torch

from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli import SpatialStructure, build, spatially_structured


@pytest.mark.papers
def test_moments_are_those_of_the_definition() -> None:
    structure = SpatialStructure.random(12, 3, dimension=5, rate=0.4, sigma=0.3, seed=1)
    batch = structure.sample(40_000, feature=2, seed=3)
    w = structure.feature(2)
    torch.testing.assert_close(w.norm(), torch.tensor(1.0))
    carries = structure.set_of[None] == batch.carrier[:, None]
    signal, rest = batch.patches[carries], batch.patches[~carries]
    label = batch.label[:, None].expand(carries.shape)[carries]
    torch.testing.assert_close((label[:, None] * signal).mean(0), w, atol=0.01, rtol=0)
    torch.testing.assert_close(rest.mean(0), torch.zeros(5), atol=0.01, rtol=0)
    # A distraction has the feature with a random sign in a share `rate` of the patches.
    wanted = 0.4 * torch.outer(w, w) + 0.3**2 * torch.eye(5)
    torch.testing.assert_close(rest.T @ rest / len(rest), wanted, atol=0.01, rtol=0)
    # Given the label, a patch carries it in one set of four.
    mean = (batch.label[:, None, None] * batch.patches).mean(0)
    torch.testing.assert_close(mean, w.expand(12, 5) / 4, atol=0.02, rtol=0)
    assert batch.label.mean().abs() < 0.02
    assert torch.bincount(batch.carrier).float().div(40_000).sub(0.25).abs().max() < 0.01


def test_sets_are_a_partition_and_localised_ones_are_squares() -> None:
    structure = SpatialStructure.random(20, 4, seed=5)
    assert sorted(i for one in structure.sets for i in one) == list(range(20))
    assert structure.sets != SpatialStructure.random(20, 4, seed=6).sets
    assert (structure.rate, structure.sigma) == (math.log(100) / 20, 0.1)
    squares = SpatialStructure.localised(4, 2, dimension=9)
    assert squares.sets == ((0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15))
    assert squares.set_of.tolist()[:6] == [0, 0, 1, 1, 0, 0]


def test_a_pair_for_transfer_shares_sets_and_differs_in_features() -> None:
    one, other = (spatially_structured(6, n_patches=8, size=2, dimension=16, feature=f, sigma=0.0, rate=0.0) for f in (0, 1))
    assert one["carrier"] == other["carrier"]
    assert one["carrier_tokens"] == other["carrier_tokens"]
    a, b = (torch.tensor(data["patches"]) for data in (one, other))
    assert (a - b).abs().max() > 0.1
    row = one[0]
    sign = 1 if row["label"] == 1 else -1
    held = torch.tensor(row["patches"])
    torch.testing.assert_close(held[row["carrier_tokens"]], sign * SpatialStructure.random(8, 2, dimension=16).feature(0).expand(2, 16))
    assert held.abs().sum(1).count_nonzero() == 2


def test_equal_options_give_equal_data_by_name() -> None:
    options = {"n": 5, "n_patches": 16, "size": 4, "localised": True, "dimension": 3}
    first, second = build("spatially_structured", **options), spatially_structured(**options)
    assert first["patches"] == second["patches"]
    assert first["patches"] != spatially_structured(**options, seed=1)["patches"]
    assert first.features["label"].names == ["negative", "positive"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpatialStructure.random(10, 4), "10 patches cannot be parted into sets of 4"),
        (lambda: SpatialStructure.localised(6, 4), "do not tile a grid of 6"),
        (lambda: SpatialStructure(((0, 1), (1, 2)), 3, 0.1, 0.1), "hold every patch from 0 on once"),
        (lambda: SpatialStructure(((0, 1),), 3, 1.5, 0.1), "rate=1.5 is a probability"),
        (lambda: spatially_structured(2, n_patches=12, size=4, localised=True), "need square numbers, not 12"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()  # type: ignore[operator]
