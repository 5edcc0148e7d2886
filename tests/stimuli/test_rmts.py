"""Relational match to sample: relations, balance, places and pixels."""

from __future__ import annotations

import numpy as np
import pytest

from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli import RMTSBatch, RMTSGenerator, allowed_combinations, rmts, shape_masks

SMALL = {"canvas": 64, "patch": 8, "cell": 16}


@pytest.fixture(scope="module")
def batch() -> RMTSBatch:
    return RMTSGenerator("train", **SMALL).batch(0, 384)


def objects_of(batch: RMTSBatch) -> np.ndarray:
    return np.stack([batch.shape, batch.color], axis=-1)


def is_same(pair: np.ndarray) -> np.ndarray:
    return (pair[:, 0] == pair[:, 1]).all(axis=-1)


def test_the_label_says_whether_the_two_relations_agree(batch: RMTSBatch) -> None:
    objects = objects_of(batch)
    sample, display = is_same(objects[:, :2]), is_same(objects[:, 2:])
    assert np.array_equal(sample, batch.relations[:, 0] == 1)
    assert np.array_equal(display, batch.relations[:, 1] == 1)
    assert np.array_equal(batch.label == 1, sample == display)


def test_the_four_combinations_of_relations_are_equally_frequent(batch: RMTSBatch) -> None:
    groups = batch.groups()
    assert {name: int(members.sum()) for name, members in groups.items()} == {
        "sample_different_display_different": 96,
        "sample_different_display_same": 96,
        "sample_same_display_different": 96,
        "sample_same_display_same": 96,
    }
    objects = objects_of(batch)[groups["sample_different_display_same"]]
    shape_differs, color_differs = (objects[:, 0] != objects[:, 1]).T
    assert {(bool(s), bool(c)) for s, c in zip(shape_differs, color_differs, strict=True)} == {
        (True, True),
        (True, False),
        (False, True),
    }


def test_the_pairs_never_show_the_same_two_objects(batch: RMTSBatch) -> None:
    for sample, display in zip(*np.split(objects_of(batch), 2, axis=1), strict=True):
        assert {tuple(o) for o in sample} != {tuple(o) for o in display}


def test_the_display_pair_stands_in_the_corner_and_the_sample_pair_elsewhere(batch: RMTSBatch) -> None:
    assert (batch.box[:, 2] == [0, 0, 16, 16]).all()
    assert (batch.box[:, 3] == [16, 0, 32, 16]).all()
    assert (batch.tokens[:, 2] == [0, 1, 8, 9]).all()
    assert (batch.tokens[:, 3] == [2, 3, 10, 11]).all()
    for tokens in batch.tokens.reshape(len(batch.label), -1):
        assert len(set(tokens)) == 16
    corners = {tuple(corner) for corner in batch.box[:, :2, :2].reshape(-1, 2)}
    assert len(corners) > 30


def test_pixels_show_the_four_objects_and_nothing_else(batch: RMTSBatch) -> None:
    for index in range(64):
        outside = np.ones((64, 64), dtype=bool)
        for (x0, y0, x1, y1), shape in zip(batch.box[index], batch.shape[index], strict=True):
            outside[y0:y1, x0:x1] = False
            ink = (batch.pixels[index, :, y0:y1, x0:x1] != 255).any(axis=0)
            assert ink.sum() == shape_masks(12)[shape].sum()
        assert (batch.pixels[index][:, outside] == 255).all()


def test_the_split_rules_the_objects() -> None:
    batch = RMTSGenerator("test", combinations="32-32-224", **SMALL).batch(0, 128)
    allowed = allowed_combinations("test", "32-32-224")
    assert allowed[batch.shape, batch.color].all()
    unseen = RMTSGenerator("val", combinations="ood-shape-color", **SMALL).batch(0, 64)
    assert min(unseen.shape.min(), unseen.color.min()) >= 16


def test_an_image_does_not_depend_on_how_many_are_made() -> None:
    whole, part = RMTSGenerator(**SMALL).batch(0, 100), RMTSGenerator(**SMALL).batch(70, 30)
    assert np.array_equal(whole.pixels[70:], part.pixels)
    assert np.array_equal(whole.tokens[70:], part.tokens)
    other = RMTSGenerator(seed=1, **SMALL).batch(70, 30)
    assert not np.array_equal(other.pixels, part.pixels)


def test_the_dataset_holds_the_generators_images() -> None:
    dataset = rmts("val", 6, progress=False, **SMALL)
    batch = RMTSGenerator("val", **SMALL).batch(0, 6)
    assert np.array_equal(np.stack([np.asarray(i).transpose(2, 0, 1) for i in dataset["base"]]), batch.pixels)
    assert dataset["label"] == batch.label.tolist()
    assert dataset["display_2_tokens"] == batch.tokens[:, 3].tolist()
    assert dataset["display_shape_1"] == batch.shape[:, 2].tolist()
    assert dataset["object_1_tokens"] == batch.tokens[:, 0].tolist()
    assert dataset.features["label"].names == ["different", "same"]


def test_the_smallest_canvas_has_room_for_four_objects() -> None:
    batch = RMTSGenerator(canvas=32, patch=8, cell=16).batch(0, 8)
    assert (np.sort(batch.tokens.reshape(8, -1), axis=1) == np.arange(16)).all()
    with pytest.raises(SpecError, match="Two cells of 16 px"):
        RMTSGenerator(canvas=24, patch=8, cell=16)
    with pytest.raises(SpecError, match="n=0: ask for at least one image"):
        rmts("val", 0)
