"""Counterfactual pairs: what the intervention would make of every base image, by rule and by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli import CounterfactualBatch, CounterfactualGenerator, counterfactuals, shape_masks
from vit_mechinterp.stimuli.splits import allowed_combinations

SMALL = {"canvas": 64, "patch": 8, "cell": 16}
ANALYSED = {"shape": 0, "color": 1}


@pytest.fixture(scope="module", params=["shape", "color"])
def attribute(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def batch(attribute: str) -> CounterfactualBatch:
    return CounterfactualGenerator(attribute, split="test", **SMALL).batch(0, 256)


def is_same(objects: np.ndarray) -> np.ndarray:
    return (objects[:, 0] == objects[:, 1]).all(axis=-1)


def test_putting_the_sources_attribute_into_the_edited_object_turns_the_label(
    batch: CounterfactualBatch, attribute: str
) -> None:
    edited = batch.base_objects.copy()
    edited[:, 0, ANALYSED[attribute]] = batch.source_objects[:, 0, ANALYSED[attribute]]
    assert np.array_equal(is_same(batch.base_objects), batch.label == 1)
    assert np.array_equal(is_same(edited), batch.counterfactual_label == 1)
    assert np.array_equal(batch.counterfactual_label, 1 - batch.label)
    assert batch.label.mean() == 0.5


def test_the_other_attribute_alone_would_not_give_the_label(
    batch: CounterfactualBatch, attribute: str
) -> None:
    second = 1 - ANALYSED[attribute]
    to_same = batch.label == 0
    base, source = batch.base_objects[to_same], batch.source_objects[to_same]
    assert (source[:, 0, second] != base[:, 0, second]).all()
    whole = base.copy()
    whole[:, 0] = source[:, 0]
    assert not is_same(whole).any()


def test_sources_of_new_objects_may_have_every_known_value(attribute: str) -> None:
    batch = CounterfactualGenerator(attribute, combinations="ood-shape-color", **SMALL).batch(0, 512)
    analysed, second = ANALYSED[attribute], 1 - ANALYSED[attribute]
    assert (batch.base_objects >= 16).all()
    assert set(batch.source_objects[batch.label == 1][:, 0, analysed]) == set(range(16))
    assert set(batch.source_objects[:, 0, second]) == set(range(16))


def test_different_to_same(batch: CounterfactualBatch, attribute: str) -> None:
    analysed, second = ANALYSED[attribute], 1 - ANALYSED[attribute]
    base, source = batch.base_objects[batch.label == 0], batch.source_objects[batch.label == 0]
    assert (base[:, 0, analysed] != base[:, 1, analysed]).all()
    assert (base[:, 0, second] == base[:, 1, second]).all()
    assert (source[:, 0, analysed] == base[:, 1, analysed]).all()
    assert (source[:, 1, analysed] != base[:, 1, analysed]).all()
    three = np.stack([base[:, 0, second], source[:, 0, second], source[:, 1, second]], axis=1)
    assert all(len(set(values)) == 3 for values in three)


def test_same_to_different(batch: CounterfactualBatch) -> None:
    base, source = batch.base_objects[batch.label == 1], batch.source_objects[batch.label == 1]
    assert is_same(base).all()
    assert is_same(source).all()
    assert (source[:, 0] != base[:, 0]).all()


def test_the_wrong_object_gives_the_label_only_where_the_source_shows_one_object_twice(
    batch: CounterfactualBatch, attribute: str
) -> None:
    wrong = batch.base_objects.copy()
    wrong[:, 0, ANALYSED[attribute]] = batch.source_objects[:, 1, ANALYSED[attribute]]
    hits = is_same(wrong) == (batch.counterfactual_label == 1)
    assert np.array_equal(hits, batch.label == 1)
    assert hits.mean() == 0.5


def test_both_images_show_what_the_metadata_says(batch: CounterfactualBatch) -> None:
    for pixels, objects, boxes in (
        (batch.base_pixels, batch.base_objects, batch.base_box),
        (batch.source_pixels, batch.source_objects, batch.source_box),
    ):
        for index in range(64):
            outside = np.ones((64, 64), dtype=bool)
            for (x0, y0, x1, y1), (shape, _) in zip(boxes[index], objects[index], strict=True):
                outside[y0:y1, x0:x1] = False
                ink = (pixels[index, :, y0:y1, x0:x1] != 255).any(axis=0)
                rows, columns = np.nonzero(ink)
                mask_rows, mask_columns = np.nonzero(shape_masks(12)[shape])
                assert np.array_equal(rows - rows.min(), mask_rows - mask_rows.min())
                assert np.array_equal(columns - columns.min(), mask_columns - mask_columns.min())
            assert (pixels[index][:, outside] == 255).all()


def test_colors_of_both_images(batch: CounterfactualBatch) -> None:
    from vit_mechinterp.stimuli import COLOR_MEANS

    for pixels, objects, boxes in (
        (batch.base_pixels, batch.base_objects, batch.base_box),
        (batch.source_pixels, batch.source_objects, batch.source_box),
    ):
        for index in range(64):
            for (x0, y0, x1, y1), (_, color) in zip(boxes[index], objects[index], strict=True):
                cell = pixels[index, :, y0:y1, x0:x1]
                mean = cell[:, (cell != 255).any(axis=0)].mean(axis=1)
                nearest = np.abs(COLOR_MEANS - mean).sum(axis=1).argmin()
                assert nearest == color


def test_positions_of_the_source_image_are_its_own(batch: CounterfactualBatch) -> None:
    assert (batch.base_box != batch.source_box).any(axis=(1, 2)).mean() > 0.9
    assert len(np.unique(batch.base_tokens[:, 0, 0])) > 20


def test_source_images_show_any_object_and_base_images_those_of_the_split(attribute: str) -> None:
    generator = CounterfactualGenerator(attribute, split="train", combinations="32-32-224", **SMALL)
    batch = generator.batch(0, 1024)
    allowed = allowed_combinations("train", "32-32-224")
    assert allowed[batch.base_objects[..., 0], batch.base_objects[..., 1]].all()
    assert not allowed[batch.source_objects[..., 0], batch.source_objects[..., 1]].all()


@pytest.mark.parametrize(("direction", "label"), [("different_to_same", 0), ("same_to_different", 1)])
def test_one_direction_alone(direction: str, label: int) -> None:
    batch = CounterfactualGenerator("shape", direction=direction, **SMALL).batch(0, 64)
    assert (batch.label == label).all()


def test_the_dataset_is_the_same_as_the_tensors(attribute: str) -> None:
    dataset = counterfactuals(attribute, 10, split="val", seed=1, canvas=64, patch=8, cell=16)
    batch = CounterfactualGenerator(attribute, split="val", seed=1, **SMALL).batch(0, 10)
    columns = batch.columns()
    assert set(columns) == set(dataset.column_names)
    assert torch.equal(columns["source"][3], (torch.from_numpy(batch.source_pixels[3]) / 255 - 0.5) / 0.5)
    for index, row in enumerate(dataset):
        assert np.array_equal(np.asarray(row["base"]).transpose(2, 0, 1), batch.base_pixels[index])
        assert np.array_equal(np.asarray(row["source"]).transpose(2, 0, 1), batch.source_pixels[index])
        assert row["edited_tokens"] == row["object_1_tokens"] == batch.base_tokens[index, 0].tolist()
        assert row["other_tokens"] == row["object_2_tokens"] == batch.base_tokens[index, 1].tolist()
        assert row["source_tokens"] == batch.source_tokens[index, 0].tolist()
        assert row["source_other_tokens"] == batch.source_tokens[index, 1].tolist()
        assert row["edited_box"] == row["box_1"] == batch.base_box[index, 0].tolist()
        assert row["source_other_box"] == batch.source_box[index, 1].tolist()
        assert [row["source_shape"], row["source_color"]] == batch.source_objects[index, 0].tolist()
        assert row["label"] == index % 2


def test_items_do_not_depend_on_how_they_are_batched(attribute: str) -> None:
    whole = CounterfactualGenerator(attribute, **SMALL).batch(0, 100)
    part = CounterfactualGenerator(attribute, **SMALL).batch(50, 30)
    assert np.array_equal(part.base_pixels, whole.base_pixels[50:80])
    assert np.array_equal(part.source_tokens, whole.source_tokens[50:80])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attribute": "colour"},
            r"attribute='colour' is not known. Choose one of: shape, color. Close matches: color",
        ),
        ({"attribute": "shape", "direction": "up"}, r"direction='up' is not known.*both, different_to_same"),
        ({"attribute": "shape", "n": 0}, r"n=0: ask for at least one pair"),
        ({"attribute": "shape", "split": "dev"}, r"no split 'dev'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        counterfactuals(**options)  # type: ignore[arg-type]
