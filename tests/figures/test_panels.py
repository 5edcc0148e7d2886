"""Panels over layers and panels of named points: what is drawn where."""

from __future__ import annotations

import numpy as np
import pytest

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures import Curve, panels_by_layer
from vit_mechinterp.figures.labelled_points import Points, labelled_points


def test_lines_have_one_colour_in_all_panels_and_controls_are_dashed() -> None:
    search, control = Curve([0, 2], [0.4, 0.9], [0.3, 0.8], [0.5, 1.0]), Curve([0, 2], [0.5, 0.5], control=True)
    figure = panels_by_layer(
        {"shape": {"search": search, "wrong": control}, "color": {"wrong": control, "search": search}},
        references={"chance": 0.5}, backdrop=[0.1, 0.5, 0.9, 0.2], columns=1,
    )  # fmt: skip
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["shape", "color"]
    colors = [{line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes]
    assert colors[0]["search"] == colors[1]["search"] != colors[0]["wrong"] == colors[1]["wrong"]
    for axes in figure.axes:
        styles = {line.get_label(): line.get_linestyle() for line in axes.lines}
        assert (styles["search"], styles["wrong"]) == ("-", "--")
        assert len(axes.patches) == 4
        assert len(axes.collections) == 1
        stars = [line for line in axes.lines if line.get_marker() == "*"]
        assert [(star.get_xdata()[0], star.get_ydata()[0]) for star in stars] == [(2, 0.9)]  # type: ignore[index]
        assert axes.get_xlim() == (-0.5, 3.5)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["search", "wrong", "chance"]
    with pytest.raises(DataError, match="no line to draw"):
        panels_by_layer({"shape": {}})


def test_points_stand_at_their_place_in_every_panel() -> None:
    points = Points(["a", "b"], [0.2, 0.8], [0.5, 0.9], [0.4, 0.8], [0.6, 1.0], note="r = 1")
    figure = labelled_points({"IID": points, "OOD": Points(["b"], [0.8], [0.6])})
    first, second = figure.axes
    drawn = {line.get_label(): np.asarray(line.get_xydata()).ravel().tolist() for line in first.lines}
    assert (drawn["a"], drawn["b"]) == ([0.2, 0.5], [0.8, 0.9])
    assert [text.get_text() for text in first.texts] == ["r = 1"]
    assert [line.get_label() for line in second.lines] == ["b"]
    assert first.get_ylim() == second.get_ylim()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    with pytest.raises(DataError, match="no point to draw"):
        labelled_points({})
