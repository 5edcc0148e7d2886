"""Maps over an image, matrices of nodes, curves and scatters show what they are given."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures import (
    Curve,
    curves,
    node_matrix,
    position_maps,
    predicted_against_exact,
    round_up,
)

GREY = Image.new("RGB", (40, 20), (120, 120, 120))


def test_patches_are_coloured_by_value_and_bare_where_there_is_none() -> None:
    values = np.array([[1.0, -1.0, 0.0, np.nan]])
    figure = position_maps({"clean": GREY}, {"layer 0": values, "layer 1": values * 0}, limits=(-1, 1), label="effect")
    panels = [axes for axes in figure.axes if axes.images]
    pixels = np.asarray(panels[1].images[0].get_array())
    positive, negative, zero, nothing = (pixels[10, column] for column in (5, 15, 25, 35))
    assert positive[0] > positive[2] + 0.3
    assert negative[2] > negative[0] + 0.3
    np.testing.assert_allclose(zero, nothing)
    assert np.ptp(nothing) < 1e-6
    assert [axes.get_xlabel() for axes in panels[:3]] == ["clean", "layer 0", "layer 1"]
    with pytest.raises(DataError, match="at least one image and one map"):
        position_maps({}, {"layer 0": values}, limits=(-1, 1))
    with pytest.raises(DataError, match=r"'layer 0' must be a matrix"):
        position_maps({"clean": GREY}, {"layer 0": values[0]}, limits=(-1, 1))


def test_a_colour_bar_begins_at_the_least_value_there_can_be() -> None:
    def ticks(limits: tuple[float, float]) -> list[str]:
        figure = position_maps({"a": GREY}, {"b": np.zeros((1, 2))}, limits=limits, least=0.0)
        return [text.get_text() for text in figure.axes[-1].get_yticklabels()]

    assert ticks((0.0, 1.0)) == ["0", "0.5", "1"]
    assert ticks((-0.2, 0.4)) == ["0", "0.1", "0.4"]
    assert ticks((-0.019, 0.021)) == ["0.001", "0.021"]


def test_whole_numbers_have_whole_ticks() -> None:
    axes = curves({"a": Curve([0, 1, 2], [0.0, 1.0, 0.5])}).axes[0]
    assert [tick for tick in axes.get_xticks() if 0 <= tick <= 2] == [0, 1, 2]
    axes = curves({"a": Curve([0, 0.25, 0.5], [0.0, 1.0, 0.5])}).axes[0]
    assert 0.1 in axes.get_xticks()


def test_many_panels_fill_several_rows() -> None:
    figure = position_maps({"clean": GREY}, {f"layer {n}": np.ones((2, 4)) for n in range(12)}, limits=(-1, 1))
    tops = {round(axes.get_subplotspec().rowspan.start) for axes in figure.axes if axes.get_subplotspec()}
    assert len(tops) == 2


@pytest.mark.parametrize(
    ("value", "end"), [(0.0, 1.0), (0.9, 1.0), (1.0, 1.0), (1.2, 1.5), (41.0, 50.0), (0.0031, 0.005), (float("nan"), 1.0)]
)
def test_round_ends(value: float, end: float) -> None:
    assert round_up(value) == pytest.approx(end)


def test_matrices_name_rows_and_columns() -> None:
    values = np.array([[1.0, np.nan, 0.5], [0.0, -1.0, np.nan]])
    figure = node_matrix(values, ["a", "b"], ["x", "y", "z"], limits=(-1, 1), label="effect")
    axes = figure.axes[0]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, values)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["x", "y", "z"]
    big = node_matrix(np.zeros((200, 3)), [str(n) for n in range(200)], ["x", "y", "z"], limits=(-1, 1))
    assert len(big.axes[0].get_yticklabels()) == 40
    with pytest.raises(DataError, match=r"2 rows and 2 columns are named, but the values have the shape \(2, 3\)"):
        node_matrix(values, ["a", "b"], ["x", "y"], limits=(-1, 1))


def test_curves_name_controls_once() -> None:
    line = Curve([0, 1], [1.0, 0.0], [0.9, -0.1], [1.1, 0.1])
    lines = {"ours": line, "random 1": Curve([0, 1], [1.0, 0.5], control=True), "random 2": Curve([0, 1], [1.0, 0.4], control=True)}
    figure = curves(lines, references={"clean": 1.0})
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["clean", "ours", "random"]
    with pytest.raises(DataError, match="no curve to draw"):
        curves({})
    with pytest.raises(DataError, match="'a' has 2 places and 1 heights"):
        curves({"a": Curve([0, 1], [1.0])})


def test_scatters_show_both_numbers() -> None:
    predicted, exact = np.array([1.0, 2.0]), np.array([1.5, -1.0])
    axes = predicted_against_exact({"a": (predicted, exact)}, note="r = 0.5").axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), np.stack([exact, predicted], axis=1))
    assert axes.get_xlim() == axes.get_ylim()
    with pytest.raises(DataError, match="no cell that was both predicted and measured"):
        predicted_against_exact({"a": (np.array([]), np.array([]))})
