"""Several figures as one picture."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vit_mechinterp.errors import DataError
from vit_mechinterp.figures import lines_by_layer
from vit_mechinterp.report.overview import overview


def test_every_figure_fills_its_column_below_its_title() -> None:
    square = Figure(figsize=(2, 2))
    square.add_artist(Rectangle((0, 0), 1, 1, color="#336699", transform=square.transFigure))
    picture = overview({"One": square, "Two": square, "Three": lines_by_layer({"a": [0, 1]})}, width=640)
    assert picture.width == 640
    pixels = np.asarray(picture)
    blue = (pixels == (0x33, 0x66, 0x99)).all(axis=-1)
    across = (640 - 3 * 28) // 2
    rows, columns = blue.any(axis=1).nonzero()[0], blue.any(axis=0).nonzero()[0]
    assert len(rows) == rows[-1] - rows[0] + 1 == across
    assert len(columns) == 2 * across
    assert (pixels[: rows[0]] < 100).any(), "no title above the figures"
    assert (pixels[rows[-1] + 30 :] < 100).any(), "no second row"
    assert (pixels[:, -20:] == 255).all()


def test_no_figure_is_no_overview() -> None:
    with pytest.raises(DataError, match="at least one figure"):
        overview({})
