"""Sixteen shapes and four more, distinct at the size at which they are drawn, and the same figure at every size."""

from __future__ import annotations

import numpy as np
import pytest

from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli import COLOR_MEANS, COLOR_NAMES, SHAPE_NAMES, shape_gallery, shape_masks
from vit_mechinterp.stimuli.colors import N_COLORS
from vit_mechinterp.stimuli.shapes import N_SHAPES

PAPER_SIZE = 24


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def test_there_are_sixteen_shapes_and_colors_and_four_more_of_each() -> None:
    assert (N_SHAPES, N_COLORS) == (16, 16)
    assert len(set(SHAPE_NAMES)) == 20
    assert len(set(COLOR_NAMES)) == len({tuple(mean) for mean in COLOR_MEANS}) == 20
    assert shape_masks(PAPER_SIZE).shape == (20, PAPER_SIZE, PAPER_SIZE)


@pytest.mark.parametrize("size", [12, 21, PAPER_SIZE, 48])
def test_no_two_shapes_are_nearly_the_same_wherever_they_stand(size: int) -> None:
    masks = shape_masks(size)
    for i in range(len(masks)):
        for j in range(i):
            shifted = [np.roll(masks[i], (dy, dx), (0, 1)) for dy in range(-3, 4) for dx in range(-3, 4)]
            assert max(overlap(mask, masks[j]) for mask in shifted) < 0.86, (SHAPE_NAMES[i], SHAPE_NAMES[j])


def test_shapes_fill_their_square() -> None:
    for name, mask in zip(SHAPE_NAMES, shape_masks(PAPER_SIZE), strict=True):
        rows, columns = np.nonzero(mask)
        assert max(np.ptp(rows), np.ptp(columns)) + 1 >= 0.9 * PAPER_SIZE, name
        assert 0.2 <= mask.mean() <= 1.0, name


def test_a_shape_is_the_same_figure_at_every_size() -> None:
    small, large = shape_masks(PAPER_SIZE), shape_masks(4 * PAPER_SIZE)
    enlarged = small.repeat(4, axis=1).repeat(4, axis=2)
    for index, name in enumerate(SHAPE_NAMES):
        assert overlap(enlarged[index], large[index]) > 0.85, name


def test_simple_shapes_against_their_formulas() -> None:
    masks = dict(zip(SHAPE_NAMES, shape_masks(PAPER_SIZE), strict=True))
    center = np.arange(PAPER_SIZE) + 0.5 - PAPER_SIZE / 2
    radius = np.hypot(center[:, None], center[None, :])
    assert masks["square"].all()
    assert masks["disc"][radius < 11.5].all()
    assert not masks["disc"][radius > 12.5].any()
    assert overlap(masks["diamond"], masks["diamond"].T) > 0.9
    assert not masks["ring"][11:13, 11:13].any()
    assert np.array_equal(masks["horseshoe"], masks["horseshoe"][:, ::-1])
    assert not np.array_equal(masks["arrow"], masks["arrow"][:, ::-1])


def test_masks_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        shape_masks(PAPER_SIZE)[0, 0, 0] = True


def test_too_small_shapes_are_refused() -> None:
    with pytest.raises(SpecError, match=r"cannot be told apart at 5 px.*6 px or more"):
        shape_masks(5)


def test_the_gallery_shows_every_shape() -> None:
    images = shape_gallery(32, color=0)
    masks = shape_masks(PAPER_SIZE)
    assert [image.size for image in images] == [(32, 32)] * 16
    for image, mask in zip(images, masks[:16], strict=True):
        drawn = (np.asarray(image) != 255).any(axis=-1)
        assert np.array_equal(drawn[4:28, 4:28], mask)
        assert drawn.sum() == mask.sum()
