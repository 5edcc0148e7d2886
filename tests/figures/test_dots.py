"""Dot charts show exactly the numbers they are given."""

from __future__ import annotations

import numpy as np
import pytest

from vit_mechinterp import figures
from vit_mechinterp.errors import DataError

GROUPS = {
    "one": {"all": (0.9, 0.85, 0.95), "same": (0.5, 0.4, 0.6)},
    "two": {"same": (1.0, 1.0, 1.0), "all": (0.2, 0.1, 0.3)},
}


def test_every_group_has_a_dot_and_its_interval_in_every_row() -> None:
    figure = figures.dots_by_row(GROUPS, label="accuracy", references={"chance": 0.5})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["all", "same"]
    dots = [
        (line.get_xdata()[0], round(line.get_ydata()[0])) for line in axes.lines if line.get_marker() == "o"
    ]
    assert dots == [(0.9, 0), (0.5, 1), (0.2, 0), (1.0, 1)]
    spans = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert spans[:4] == [(0.85, 0.95), (0.4, 0.6), (0.1, 0.3), (1.0, 1.0)]
    assert spans[4] == (0.5, 0.5)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_rows_must_be_the_same() -> None:
    with pytest.raises(DataError, match="one: all, same; two: all"):
        figures.dots_by_row({"one": GROUPS["one"], "two": {"all": (0.0, 0.0, 0.0)}})
    with pytest.raises(DataError, match="at least one"):
        figures.dots_by_row({})


def test_every_run_is_a_column_of_examples_with_its_mean() -> None:
    values = np.array([[-3.0, -1.0], [2.0, -2.0], [4.0, 1.0]])
    figure = figures.examples_by_run(values, ["clean", "head", "both"], ends=("base", "source"))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["clean", "head", "both"]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    np.testing.assert_allclose([line.get_ydata() for line in lines], values.T)
    means = [line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 2][1:]
    np.testing.assert_allclose(means, values.mean(axis=1))
    assert [text.get_text() for text in axes.texts] == ["−2.0", "+0.0", "+2.5", "base", "source"]
    low, high = axes.get_ylim()
    assert low == -high < -4
    with pytest.raises(DataError, match="2 runs and 2 examples are named"):
        figures.examples_by_run(values, ["clean", "head"])
