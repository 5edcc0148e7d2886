"""Which objects the splits may show."""

from __future__ import annotations

import numpy as np
import pytest

from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli import SPLITS, allowed_combinations
from vit_mechinterp.stimuli.splits import object_pairs


def test_all_combinations_everywhere_by_default() -> None:
    for split in SPLITS:
        allowed = allowed_combinations(split)
        assert allowed[:16, :16].all()
        assert allowed.sum() == 256


def test_the_compositional_split_trains_on_two_shapes_of_each_color() -> None:
    train = allowed_combinations("train", "32-32-224")
    assert train.sum() == 32
    assert (train.sum(axis=0)[:16] == 2).all()
    assert (train.sum(axis=1)[:16] == 2).all()
    for color in range(16):
        assert set(np.flatnonzero(train[:, color])) == {(color + 14) % 16, (color + 15) % 16}


def test_the_compositional_split_tests_on_the_other_objects() -> None:
    train, val, test, test_iid = (allowed_combinations(split, "32-32-224") for split in SPLITS)
    assert np.array_equal(train, val)
    assert np.array_equal(train, test_iid)
    assert np.array_equal(train[:16, :16], ~test[:16, :16])


@pytest.mark.parametrize(
    ("combinations", "shapes", "colors"),
    [("ood-shape", (16, 20), (0, 16)), ("ood-color", (0, 16), (16, 20)), ("ood-shape-color", (16, 20), (16, 20))],
)
def test_out_of_distribution_sets_show_new_values_in_every_split(
    combinations: str, shapes: tuple[int, int], colors: tuple[int, int]
) -> None:
    for split in SPLITS:
        shape, color = np.nonzero(allowed_combinations(split, combinations))
        assert set(shape) == set(range(*shapes))
        assert set(color) == set(range(*colors))
        assert len(shape) == (shapes[1] - shapes[0]) * (colors[1] - colors[0])


@pytest.mark.parametrize("combinations", ["256-256-256", "32-32-224", "64-64-192", "ood-shape"])
def test_pairs_differ_in_the_named_attributes_alone(combinations: str) -> None:
    for split in SPLITS:
        allowed = allowed_combinations(split, combinations)
        objects = [tuple(found) for found in np.argwhere(allowed)]
        for kind, shape_differs, color_differs in (
            ("both", True, True),
            ("shape", True, False),
            ("color", False, True),
        ):
            expected = {
                (a, b)
                for a in objects
                for b in objects
                if (a[0] != b[0]) == shape_differs and (a[1] != b[1]) == color_differs
            }
            pairs = object_pairs(kind, split, combinations)
            assert {(tuple(a), tuple(b)) for a, b in pairs} == expected
            assert len(pairs) == len(expected) > 0


@pytest.mark.parametrize(
    "combinations", ["32-32-32", "16-16-240", "31-31-225", "all", "32-224", "240-240-16"]
)
def test_unknown_split_strings_are_refused(combinations: str) -> None:
    with pytest.raises(SpecError, match=rf"combinations='{combinations}' names no split .*'32-32-224'"):
        allowed_combinations("train", combinations)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(
        SpecError, match=r"no split 'tset'. Splits: train, val, test, test_iid. Close matches: test"
    ):
        allowed_combinations("tset")  # type: ignore[arg-type]
