"""Pairs that differ in one object: putting the source's object into the base makes what the source shows."""

from __future__ import annotations

import numpy as np
import pytest

from vit_mechinterp import stimuli
from vit_mechinterp.errors import SpecError

SMALL = {"canvas": 64, "patch": 8, "cell": 16}


@pytest.fixture(scope="module")
def data():
    return stimuli.object_exchanges("val", 96, seed=3, **SMALL)


def pixels(data, column: str) -> np.ndarray:
    return np.stack([np.asarray(image) for image in data[column]])


def test_the_images_of_a_pair_are_each_other_s_source(data) -> None:
    base, source = pixels(data, "base"), pixels(data, "source")
    assert np.array_equal(base[0::2], source[1::2])
    assert np.array_equal(base[1::2], source[0::2])
    assert not np.array_equal(base[0], source[0])
    plain = stimuli.discrimination("val", 96, seed=3, **SMALL)
    assert np.array_equal(base, pixels(plain, "base"))
    assert list(data["label"]) == list(plain["label"]) == [0, 1] * 48
    assert list(data["counterfactual_label"]) == [1, 0] * 48


def test_one_object_is_edited_and_the_other_is_the_same_one(data) -> None:
    columns = {name: np.array(data[name]) for name in data.column_names if name not in ("base", "source")}
    objects = np.stack(
        [[columns[f"shape_{k}"], columns[f"color_{k}"]] for k in (1, 2)]
    )  # object, attribute, n
    partner = objects[:, :, np.arange(96) ^ 1]
    edited = columns["edited_object"] - 1
    n = np.arange(96)
    assert (objects[1 - edited, :, n] == partner[1 - edited, :, n]).all()
    assert (objects[edited, :, n] != partner[edited, :, n]).any(axis=1).all()
    # With the source's object in its place, the two objects are the same exactly where the label says so.
    exchanged = partner[edited, :, n] == objects[1 - edited, :, n]
    assert (exchanged.all(axis=1) == columns["counterfactual_label"]).all()
    assert set(edited) == {0, 1}


def test_places_are_those_of_the_named_object_in_both_images(data) -> None:
    for example in data.select(range(12)):
        edited, other = example["edited_object"], 3 - example["edited_object"]
        for kind in ("box", "tokens"):
            name = "box_{}" if kind == "box" else "object_{}_tokens"
            assert example[f"edited_{kind}"] == example[f"source_{kind}"] == example[name.format(edited)]
            assert example[f"other_{kind}"] == example[f"source_other_{kind}"] == example[name.format(other)]
        for column in ("base", "source"):
            image = np.asarray(example[column]).copy()
            for box in (example["edited_box"], example["other_box"]):
                x0, y0, x1, y1 = box
                assert (image[y0:y1, x0:x1] < 255).any()
                image[y0:y1, x0:x1] = 255
            assert (image == 255).all()


def test_the_kind_of_difference_is_that_of_the_different_image(data) -> None:
    kinds = data["different_kind"]
    assert set(kinds) == {"both", "shape", "color"}
    for index in range(0, 12, 2):
        example = data[index]
        assert kinds[index] == kinds[index + 1]
        differs = {name for name in ("shape", "color") if example[f"{name}_1"] != example[f"{name}_2"]}
        assert differs == ({"shape", "color"} if kinds[index] == "both" else {kinds[index]})


def test_an_odd_number_ends_with_a_whole_pair_s_source() -> None:
    short = stimuli.object_exchanges("val", 3, seed=3, **SMALL)
    assert len(short) == 3
    assert list(short["counterfactual_label"]) == [1, 0, 1]
    with pytest.raises(SpecError, match="n=0: ask for at least one pair"):
        stimuli.object_exchanges(n=0)
