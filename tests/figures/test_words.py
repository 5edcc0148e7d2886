"""Words over an image: one colour per word, stronger where it is likelier."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures import Curve, curves
from vit_mechinterp.figures.style import PALETTE
from vit_mechinterp.figures.words import word_maps

GREY = Image.new("RGB", (40, 20), "#808080")


def test_patches_have_the_colours_of_their_words() -> None:
    words = {"layer 0": [["cat", "dog"]], "layer 1": [["cat", "cat"]]}
    figure = word_maps(GREY, words, {"layer 0": np.array([[1.0, 0.0]]), "layer 1": np.ones((1, 2))})
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in panels] == ["image", "layer 0", "layer 1"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "dog"]
    shown = np.asarray(panels[1].images[0].get_array())
    blue = np.array([int(PALETTE[0][i : i + 2], 16) / 255 for i in (1, 3, 5)])
    ground = 0.45 + 0.5 * 128 / 255
    np.testing.assert_allclose(shown[5, 5], 0.9 * blue + 0.1 * ground, atol=1e-6)
    assert np.abs(shown[5, 30] - ground).max() < np.abs(shown[5, 5] - ground).max() / 2


def test_many_words_share_a_grey() -> None:
    figure = word_maps(GREY, {"layer 0": [[f"word {i}" for i in range(20)]]})
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == len(PALETTE) + 1
    assert texts[-1] == "12 others"


def test_what_is_no_map_is_refused() -> None:
    with pytest.raises(DataError, match="need at least one map"):
        word_maps(GREY, {})
    with pytest.raises(DataError, match=r"'a' must be a matrix \[row, column\]; its shape is \(2,\)"):
        word_maps(GREY, {"a": ["x", "y"]})
    with pytest.raises(DataError, match=r"strengths of 'a' have the shape \(2, 2\), its words \(1, 2\)"):
        word_maps(GREY, {"a": [["x", "y"]]}, {"a": np.ones((2, 2))})


@pytest.mark.filterwarnings("error")
def test_a_curve_of_one_place_is_a_dot_with_its_interval() -> None:
    figure = curves({"effect": Curve([3], [0.5], [0.4], [0.7]), "random 1": Curve([3], [0.1], control=True)})
    axes = figure.axes[0]
    assert axes.get_xlim() == (2, 4)
    (bar,) = [own for own in axes.collections if type(own).__name__ == "LineCollection"]
    np.testing.assert_allclose(bar.get_segments()[0], [[3, 0.4], [3, 0.7]])
