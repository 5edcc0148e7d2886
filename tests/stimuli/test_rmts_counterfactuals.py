"""Counterfactual pairs of relational match to sample: what the intervention would make of every base."""

from __future__ import annotations

import numpy as np
import pytest

from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli import (
    RMTSCounterfactualBatch,
    RMTSCounterfactualGenerator,
    allowed_combinations,
    rmts_counterfactuals,
    shape_masks,
)

SMALL = {"canvas": 64, "patch": 8, "cell": 16}
ANALYSED = {"shape": 0, "color": 1}


@pytest.fixture(scope="module", params=["shape", "color"])
def attribute(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def batch(attribute: str) -> RMTSCounterfactualBatch:
    return RMTSCounterfactualGenerator(attribute, split="test", **SMALL).batch(0, 256)


def relations(objects: np.ndarray) -> np.ndarray:
    return np.stack([(objects[:, k] == objects[:, k + 1]).all(axis=-1) for k in (0, 2)], axis=1)


def label_of(objects: np.ndarray) -> np.ndarray:
    sample, display = relations(objects).T
    return (sample == display).astype(int)


def after_the_edit(batch: RMTSCounterfactualBatch, attribute: str, source: np.ndarray) -> np.ndarray:
    objects, rows = batch.base_objects.copy(), np.arange(len(batch.label))
    taken = batch.source_objects[rows, source, ANALYSED[attribute]]
    objects[rows, batch.edited, ANALYSED[attribute]] = taken
    return objects


def test_the_edit_turns_the_edited_pairs_relation_and_with_it_the_label(
    batch: RMTSCounterfactualBatch, attribute: str
) -> None:
    rows = np.arange(len(batch.label))
    before = relations(batch.base_objects)
    after = relations(after_the_edit(batch, attribute, batch.source))
    assert np.array_equal(label_of(batch.base_objects), batch.label)
    assert np.array_equal(before[rows, batch.edited // 2], batch.relation == 1)
    assert np.array_equal(after[rows, batch.edited // 2], batch.relation == 0)
    assert np.array_equal(after[rows, 1 - batch.edited // 2], before[rows, 1 - batch.edited // 2])
    assert np.array_equal(batch.metadata()["counterfactual_label"], 1 - batch.label)


def test_label_relation_and_edited_pair_are_balanced(batch: RMTSCounterfactualBatch) -> None:
    cells = batch.edited // 2 * 4 + batch.relation * 2 + batch.label
    assert np.bincount(cells).tolist() == [32] * 8
    assert 0.3 < (batch.edited % 2).mean() < 0.7


def test_the_source_image_differs_from_the_base_in_one_attribute_of_the_source_object(
    batch: RMTSCounterfactualBatch, attribute: str
) -> None:
    differs = batch.base_objects != batch.source_objects
    assert (differs.sum(axis=(1, 2)) == 1).all()
    assert differs[np.arange(len(differs)), batch.source, ANALYSED[attribute]].all()
    assert (batch.source // 2 == 1 - batch.edited // 2).all()
    assert (batch.source % 2 == batch.edited % 2).all()


def test_different_pairs_that_are_edited_differ_in_the_analysed_attribute_alone(
    batch: RMTSCounterfactualBatch, attribute: str
) -> None:
    rows = np.flatnonzero(batch.relation == 0)
    edited, partner = batch.edited[rows], batch.edited[rows] ^ 1
    differs = batch.base_objects[rows, edited] != batch.base_objects[rows, partner]
    assert differs[:, ANALYSED[attribute]].all()
    assert not differs[:, 1 - ANALYSED[attribute]].any()


def test_the_wrong_object_seldom_gives_the_label(batch: RMTSCounterfactualBatch, attribute: str) -> None:
    wrong = after_the_edit(batch, attribute, batch.source ^ 1)
    turned = label_of(wrong) == 1 - batch.label
    # In a "same" pair any other value makes it different; a "different" pair needs the partner's own.
    assert turned[batch.relation == 0].mean() < 0.2
    assert turned[batch.relation == 1].mean() > 0.8


def test_both_images_show_what_the_metadata_says(batch: RMTSCounterfactualBatch) -> None:
    for pixels, objects in (
        (batch.base_pixels, batch.base_objects),
        (batch.source_pixels, batch.source_objects),
    ):
        for index in range(48):
            outside = np.ones((64, 64), dtype=bool)
            for (x0, y0, x1, y1), (shape, _) in zip(batch.box[index], objects[index], strict=True):
                outside[y0:y1, x0:x1] = False
                rows, columns = np.nonzero((pixels[index, :, y0:y1, x0:x1] != 255).any(axis=0))
                mask_rows, mask_columns = np.nonzero(shape_masks(12)[shape])
                assert np.array_equal(rows - rows.min(), mask_rows - mask_rows.min())
                assert np.array_equal(columns - columns.min(), mask_columns - mask_columns.min())
            assert (pixels[index][:, outside] == 255).all()


def test_base_objects_obey_the_split() -> None:
    batch = RMTSCounterfactualGenerator("shape", split="test", combinations="32-32-224", **SMALL).batch(0, 64)
    allowed = allowed_combinations("test", "32-32-224")
    assert allowed[batch.base_objects[..., 0], batch.base_objects[..., 1]].all()


def test_the_dataset_names_the_places() -> None:
    dataset = rmts_counterfactuals("color", 16, split="val", progress=False, **SMALL)
    batch = RMTSCounterfactualGenerator("color", split="val", **SMALL).batch(0, 16)
    for row, edited, source in zip(dataset, batch.edited, batch.source, strict=True):
        own = [row["object_1_tokens"], row["object_2_tokens"], row["display_1_tokens"], row["display_2_tokens"]]
        assert row["edited_tokens"] == own[edited]
        assert row["other_tokens"] == own[edited ^ 1]
        assert row["source_tokens"] == own[source]
        assert row["source_other_tokens"] == own[source ^ 1]
        assert row["edited_pair"] == ("sample" if edited < 2 else "display")
    assert dataset["intermediate_judgement"] == batch.relation.tolist()


def test_bad_options_are_refused() -> None:
    with pytest.raises(SpecError, match=r"attribute='size' is not known. Choose one of: shape, color"):
        rmts_counterfactuals("size", 8)
    with pytest.raises(SpecError, match="n=0: ask for at least one pair"):
        rmts_counterfactuals("shape", 0)
