"""Figures show exactly the numbers they are given, and leave no trace in matplotlib's settings."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vit_mechinterp import figures
from vit_mechinterp.errors import DataError

VALUES = np.random.default_rng(0).uniform(0.3, 0.6, (6, 4))
LINES = {"within object": [0.9, 0.7, 0.2, 0.1], "background": [0.1, 0.2, 0.3, 0.4]}


def stars(figure: Figure) -> list[tuple[float, float]]:
    lines = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "*"]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]


def picture(size: int = 32, value: int = 255) -> Image.Image:
    return Image.new("RGB", (size, size), (value,) * 3)


def test_heads_are_rows_and_layers_are_columns_under_a_fixed_range() -> None:
    image = figures.head_layer_map(VALUES).axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), VALUES.T)
    assert image.get_clim() == (0.0, 1.0)
    assert image.get_cmap().name == "coolwarm"


def test_every_condition_is_a_named_row() -> None:
    names = ["edited", "other", "CLS", "background"]
    axes = figures.condition_map(VALUES * 10, names, limits=(-5, 5)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    np.testing.assert_array_equal(axes.images[0].get_array(), (VALUES * 10).T)
    assert axes.images[0].get_clim() == (-5, 5)


def test_cells_carry_their_numbers_where_they_fit() -> None:
    few = figures.head_layer_map(np.array([[0.25, 1.0], [-0.5, 0.0]]), limits=(-1, 1))
    assert [text.get_text() for text in few.axes[0].texts] == [".25", "-.50", "1.0", ".00"]
    many = figures.head_layer_map(np.zeros((12, 12)))
    assert not many.axes[0].texts


def test_missing_cells_stay_empty() -> None:
    figure = figures.head_layer_map(np.array([[0.25, np.nan]]))
    assert [text.get_text() for text in figure.axes[0].texts] == [".25"]
    assert figures.png_bytes(figure).startswith(b"\x89PNG")


def test_a_star_marks_the_peak_of_every_line() -> None:
    assert stars(figures.lines_by_layer(LINES)) == [(0, 0.9), (3, 0.4)]
    assert stars(figures.lines_by_layer(LINES, first_peak_layer=1)) == [(1, 0.7), (3, 0.4)]


def test_stages_share_the_layer_axis() -> None:
    figure = figures.stages_over_layers(VALUES[:4], LINES)
    above, below = figure.axes[:2]
    np.testing.assert_array_equal(above.images[0].get_array(), VALUES[:4].T)
    assert above.get_xlim() == below.get_xlim() == (-0.5, 3.5)
    assert stars(figure) == [(0, 0.9), (3, 0.4)]
    with pytest.raises(DataError, match="heat map has 6 layers, the lines have 4"):
        figures.stages_over_layers(VALUES, LINES)


def test_das_shows_controls_chance_and_no_effect() -> None:
    figure = figures.das_by_layer(
        {"shape": [0.5, 0.9, 0.1], "colour": [0.8, 0.7, 0.2]},
        controls={"shape": [0.5, 0.52, 0.1]},
        no_effect=0.03,
        backdrop=[0.1, 0.5, 0.9],
    )
    axes = figure.axes[0]
    drawn = [list(np.asarray(line.get_ydata(), dtype=float)) for line in axes.lines]
    for expected in ([0.5, 0.9, 0.1], [0.8, 0.7, 0.2], [0.5, 0.52, 0.1], [0.5, 0.5], [0.03, 0.03]):
        assert expected in drawn
    labels = {text.get_text() for text in axes.texts}
    assert labels == {"shape", "colour", "shape, wrong object", "chance", "no effect"}
    assert stars(figure) == [(1, 0.9), (0, 0.8)]
    with pytest.raises(DataError, match=r"controls for \['size'\]"):
        figures.das_by_layer({"shape": [0.5]}, controls={"size": [0.5]})


def test_labels_at_line_ends_do_not_overlap() -> None:
    lines = {f"line {index}": [0.5, 0.5 + index / 1000] for index in range(5)}
    axes = figures.lines_by_layer(lines).axes[0]
    axes.get_figure().canvas.draw()
    extents = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(extents) == 5
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(extents))


def test_lines_of_different_length_are_an_error() -> None:
    with pytest.raises(DataError, match=r"their lengths are \{'a': 2, 'b': 1\}"):
        figures.lines_by_layer({"a": [0, 1], "b": [0]})
    with pytest.raises(DataError, match="2 conditions are named"):
        figures.condition_map(VALUES, ["a", "b"])
    with pytest.raises(
        DataError, match=r"takes a matrix \[layer, head\]; these values have the shape \(3,\)"
    ):
        figures.head_layer_map(np.zeros(3))


def test_boxes_are_drawn_around_their_pixels() -> None:
    boxes = [{"edited": (4, 8, 20, 16)}, {}]
    figure = figures.contact_sheet([picture(), picture()], boxes=boxes, captions=["a", "b"])
    assert [axes.get_xlabel() for axes in figure.axes] == ["a", "b"]
    assert len(figure.axes[1].patches) == 0
    box = figure.axes[0].patches[0].get_bbox()
    assert (box.x0, box.y0, box.x1, box.y1) == (3.5, 7.5, 19.5, 15.5)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["edited"]
    with pytest.raises(DataError, match="2 images but 1 captions"):
        figures.contact_sheet([picture(), picture()], captions=["a"])


def test_attention_dims_the_patches_it_passes_over() -> None:
    attention = np.array([[0.0, 0.2], [0.1, 0.0]])
    figure = figures.attention_overlay(picture(), {"head 1": attention})
    shown = np.asarray(figure.axes[1].images[0].get_array())
    patches = shown.mean(-1).reshape(2, 16, 2, 16).mean((1, 3))
    np.testing.assert_allclose(patches, [[0.12, 1.0], [0.56, 0.12]])
    assert figure.axes[1].get_xlabel() == "head 1\nmax. 0.20"
    with pytest.raises(DataError, match="'head 1' must be a matrix"):
        figures.attention_overlay(picture(), {"head 1": -attention})


def test_equal_figures_are_equal_files_whatever_the_users_settings(tmp_path) -> None:
    first = figures.png_bytes(figures.lines_by_layer(LINES))
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        second = figures.png_bytes(figures.lines_by_layer(LINES))
        assert dict(matplotlib.rcParams) == before
    assert first == second

    png, pdf = figures.save_figure(figures.lines_by_layer(LINES), tmp_path / "lines")
    _, again = figures.save_figure(figures.lines_by_layer(LINES), tmp_path / "again")
    assert png.read_bytes() == first
    assert pdf.read_bytes() == again.read_bytes()
    assert b"CreationDate" not in pdf.read_bytes()


def test_drawing_never_loads_pyplot() -> None:
    code = (
        "import sys; from vit_mechinterp import figures;"
        "figures.png_bytes(figures.lines_by_layer({'a': [0, 1]}));"
        "figures.png_bytes(figures.head_layer_map([[0.0, 1.0]]));"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bands_surround_their_own_line() -> None:
    low, high = [0.8, 0.6, 0.1, 0.0], [1.0, 0.8, 0.3, 0.2]
    figure = figures.lines_by_layer(LINES, bands={"within object": (low, high)})
    (axes,) = figure.axes
    (band,) = axes.collections
    corners = {(float(x), float(y)) for x, y in band.get_paths()[0].vertices}
    assert corners >= {(i, y) for ends in (low, high) for i, y in enumerate(ends)}
    assert matplotlib.colors.to_hex(band.get_facecolor()[0]) == axes.lines[0].get_color().lower()
    with pytest.raises(DataError, match="band for 'CLS', but lines only for within object, background"):
        figures.lines_by_layer(LINES, bands={"CLS": (low, high)})
    with pytest.raises(DataError, match="one value per layer"):
        figures.lines_by_layer(LINES, bands={"background": (low[:3], high)})
