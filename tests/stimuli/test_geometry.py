"""Where objects may stand, against brute force over pixels."""

from __future__ import annotations

import numpy as np
import pytest

from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli import Geometry

SIZES = [(64, 8, 16), (64, 16, 24), (96, 16, 16), (112, 14, 28), (64, 32, 32)]


def test_the_papers_numbers() -> None:
    paper = Geometry()
    assert (paper.grid, paper.drawn, paper.max_shift, paper.tokens_per_object) == (14, 24, 8, 4)
    assert len(np.unique(paper.corner_pairs().reshape(-1, 2), axis=0)) == 13 * 13
    assert Geometry(224, 14, 28).drawn == 21
    assert Geometry(224, 14, 28).max_shift == 7
    assert Geometry(224, 32, 32).tokens_per_object == 1


@pytest.mark.parametrize(("canvas", "patch", "cell"), SIZES)
def test_tokens_are_the_patches_that_the_box_touches(canvas: int, patch: int, cell: int) -> None:
    geometry = Geometry(canvas, patch, cell)
    corners = np.unique(geometry.corner_pairs().reshape(-1, 2), axis=0)
    for corner in corners:
        x0, y0, x1, y1 = geometry.boxes(corner)
        assert (x1 - x0, y1 - y0) == (cell, cell)
        assert min(x0, y0) >= 0
        assert max(x1, y1) <= canvas
        touched = np.zeros((canvas, canvas), dtype=bool)
        touched[y0:y1, x0:x1] = True
        patches = touched.reshape(canvas // patch, patch, canvas // patch, patch).any(axis=(1, 3))
        assert np.array_equal(geometry.tokens(corner), np.flatnonzero(patches))


@pytest.mark.parametrize(("canvas", "patch", "cell"), SIZES)
def test_corner_pairs_are_all_pairs_that_share_no_patch(canvas: int, patch: int, cell: int) -> None:
    geometry = Geometry(canvas, patch, cell)
    tokens = geometry.tokens(geometry.corner_pairs())
    found = {(tuple(first), tuple(second)) for first, second in tokens}
    assert len(found) == len(tokens)
    grid, span = canvas // patch, -(-cell // patch)
    places = [(x, y) for x in range(grid - span + 1) for y in range(grid - span + 1)]
    covered = [
        tuple(sorted((y + dy) * grid + x + dx for dy in range(span) for dx in range(span))) for x, y in places
    ]
    assert found == {(a, b) for a in covered for b in covered if not set(a) & set(b)}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((100, 16, 32), r"canvas=100, patch=16, cell=32.*multiple of the patch"),
        ((0, 16, 32), r"positive pixel counts"),
        ((64, 16, 48), r"3 x 3 patches of 16 px each, do not fit side by side on a canvas of 64 px"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Geometry(*sizes)
