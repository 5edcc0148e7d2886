"""Random streams: distributions, independence, and the same bits everywhere."""

from __future__ import annotations

import numpy as np
from scipy import stats

from vit_mechinterp.stimuli.streams import Stream


def test_a_stream_depends_on_its_seed_and_on_every_part_of_its_path() -> None:
    addresses = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 0), (0, "a")]
    drawn = {tuple(Stream(*address).below(1000, 8)) for address in addresses}
    assert len(drawn) == len(addresses)
    assert np.array_equal(Stream(0, "a", 1).below(1000, 8), Stream(0, "a", 1).below(1000, 8))


def test_integers_are_uniform() -> None:
    drawn = Stream(0, "uniform").below(9, 90_000)
    assert stats.chisquare(np.bincount(drawn, minlength=9)).pvalue > 1e-3


def test_limits_may_differ_by_element() -> None:
    limits = np.array([1, 2, 50])
    drawn = Stream(0, "limits").below(limits, 1000, 3)
    assert (drawn >= 0).all()
    assert drawn.max(axis=0).tolist() == [0, 1, 49]


def test_excluded_values_never_come_and_the_others_are_uniform() -> None:
    one = np.tile(np.arange(16), 2000)
    other = (one + 5) % 16
    drawn = Stream(0, "excluding").excluding(16, one, other)
    assert (drawn != one).all()
    assert (drawn != other).all()
    distance = np.bincount((drawn - one) % 16, minlength=16)
    assert distance[0] == distance[5] == 0
    assert stats.chisquare(np.delete(distance, [0, 5])).pvalue > 1e-3


def test_excluded_values_beyond_the_limit_take_nothing_away() -> None:
    one, other = np.tile(np.array([3, 17]), 8000), np.full(16_000, 19)
    drawn = Stream(0, "beyond").excluding(16, one, other)
    assert (drawn != one).all()
    assert stats.chisquare(np.bincount(drawn[1::2], minlength=16)).pvalue > 1e-3
    assert stats.chisquare(np.delete(np.bincount(drawn[::2], minlength=16), 3)).pvalue > 1e-3


def test_normal_numbers_are_normal() -> None:
    drawn = Stream(0, "normal").normal(10.0, 200_000)
    assert drawn.dtype == np.int16
    edges = np.arange(-30.5, 31.5)
    counts, _ = np.histogram(drawn, edges)
    expected = np.diff(stats.norm(0, 10).cdf(edges))
    inside = counts.sum()
    assert stats.chisquare(counts, expected / expected.sum() * inside).pvalue > 1e-3
    assert abs(drawn.std() - 10) < 0.1
