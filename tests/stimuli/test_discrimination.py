"""The discrimination task: everything that the metadata says is read off the pixels again."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli import (
    COLOR_MEANS,
    DiscriminationBatch,
    DiscriminationGenerator,
    Normalization,
    allowed_combinations,
    discrimination,
    shape_masks,
)

SMALL = {"canvas": 64, "patch": 8, "cell": 16}


@pytest.fixture(scope="module")
def batch() -> DiscriminationBatch:
    return DiscriminationGenerator("train", **SMALL).batch(0, 192)


def find_object(pixels: np.ndarray, box: np.ndarray, shape: int, drawn: int) -> tuple[int, int]:
    """The shift at which the shape's mask is exactly what is not white in the box."""
    x0, y0, x1, y1 = box
    ink = (pixels[:, y0:y1, x0:x1] != 255).any(axis=0)
    mask = shape_masks(drawn)[shape]
    shifts = range(ink.shape[0] - drawn + 1)
    found = [
        (dx, dy)
        for dy in shifts
        for dx in shifts
        if ink.sum() == mask.sum() and np.array_equal(ink[dy : dy + drawn, dx : dx + drawn], mask)
    ]
    assert len(found) == 1, f"shape {shape} is not what the box {box} shows"
    return found[0]


def test_pixels_show_what_the_metadata_says(batch: DiscriminationBatch) -> None:
    shifts = []
    for index in range(len(batch.label)):
        pixels = batch.pixels[index]
        outside = np.ones(pixels.shape[1:], dtype=bool)
        for k in range(2):
            x0, y0, x1, y1 = batch.box[index, k]
            outside[y0:y1, x0:x1] = False
            shifts.append(find_object(pixels, batch.box[index, k], batch.shape[index, k], 12))
        assert (pixels[:, outside] == 255).all()
    assert {shift for pair in shifts for shift in pair} == {0, 1, 2, 3, 4}


def test_colors_are_a_gaussian_texture_around_the_mean_clipped_to_250(batch: DiscriminationBatch) -> None:
    inside: dict[int, list[np.ndarray]] = {color: [] for color in range(16)}
    for index in range(len(batch.label)):
        for k in range(2):
            x0, y0, x1, y1 = batch.box[index, k]
            cell = batch.pixels[index, :, y0:y1, x0:x1]
            inside[batch.color[index, k]].append(cell[:, (cell != 255).any(axis=0)])
    for color, parts in inside.items():
        values = np.concatenate(parts, axis=1).astype(float)
        assert values.max() <= 250
        for channel, mean in enumerate(COLOR_MEANS[color]):
            if 40 <= mean <= 210:
                assert abs(values[channel].mean() - mean) < 1.0
                assert abs(values[channel].std() - 10) < 0.7
        correlation = np.corrcoef(values)
        middle = [c for c in range(3) if 40 <= COLOR_MEANS[color][c] <= 210]
        assert all(abs(correlation[a, b]) < 0.1 for a in middle for b in middle if a != b)


def test_labels_balance_and_kinds_cycle(batch: DiscriminationBatch) -> None:
    same = (batch.shape[:, 0] == batch.shape[:, 1]) & (batch.color[:, 0] == batch.color[:, 1])
    assert np.array_equal(batch.label, same.astype(int))
    assert batch.label.mean() == 0.5
    differs = np.stack(
        [batch.shape[:, 0] != batch.shape[:, 1], batch.color[:, 0] != batch.color[:, 1]], axis=1
    )
    by_kind = np.array([[False, False], [True, True], [True, False], [False, True]])
    assert np.array_equal(differs, by_kind[batch.different_kind])
    assert batch.different_kind[batch.label == 0][:6].tolist() == [1, 2, 3, 1, 2, 3]


def test_same_and_different_images_share_their_cells_and_one_object(batch: DiscriminationBatch) -> None:
    different, same = batch.label == 0, batch.label == 1
    assert np.array_equal(batch.box[different], batch.box[same])
    objects = np.stack([batch.shape, batch.color], axis=-1)
    is_first = (objects[same][:, 0] == objects[different][:, 0]).all(axis=-1)
    is_second = (objects[same][:, 0] == objects[different][:, 1]).all(axis=-1)
    assert (is_first ^ is_second).all()
    assert 0.3 < is_first.mean() < 0.7


def test_same_objects_are_not_the_same_pixels(batch: DiscriminationBatch) -> None:
    cells = []
    for index in np.flatnonzero(batch.label):
        for k in range(2):
            x0, y0, _, _ = batch.box[index, k]
            dx, dy = find_object(batch.pixels[index], batch.box[index, k], batch.shape[index, k], 12)
            cells.append(batch.pixels[index, :, y0 + dy : y0 + dy + 12, x0 + dx : x0 + dx + 12])
    assert len({cell.tobytes() for cell in cells}) == len(cells)


def test_objects_never_share_a_token_and_tokens_follow_from_boxes(batch: DiscriminationBatch) -> None:
    for boxes, tokens in zip(batch.box, batch.tokens, strict=True):
        assert len(set(tokens.reshape(-1))) == 8
        for (x0, y0, x1, y1), own in zip(boxes, tokens, strict=True):
            expected = [y // 8 * 8 + x // 8 for y in range(y0, y1, 8) for x in range(x0, x1, 8)]
            assert own.tolist() == expected


def test_every_object_and_corner_comes() -> None:
    batch = DiscriminationGenerator("train", canvas=32, patch=8, cell=8).batch(0, 4096)
    assert len(np.unique(batch.shape * 16 + batch.color)) == 256
    assert len(np.unique(batch.tokens)) == 16


def test_images_do_not_depend_on_how_they_are_batched() -> None:
    whole = DiscriminationGenerator("val", seed=3, **SMALL).batch(0, 150)
    generator = DiscriminationGenerator("val", seed=3, **SMALL)
    parts = [generator.batch(140, 10), *generator.batches(140, 33)]
    order = [*range(140, 150), *range(140)]
    for name in ("pixels", "label", "different_kind", "shape", "color", "box", "tokens"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(joined, getattr(whole, name)[order]), name


def test_no_image_is_in_two_splits_or_under_two_seeds() -> None:
    seen: set[bytes] = set()
    for split in ("train", "val", "test", "test_iid"):
        for seed in (0, 1):
            pixels = DiscriminationGenerator(split, seed=seed, **SMALL).batch(0, 128).pixels
            seen |= {image.tobytes() for image in pixels}
    assert len(seen) == 8 * 128


def test_compositional_test_images_show_no_object_of_training() -> None:
    objects = {}
    for split in ("train", "val", "test", "test_iid"):
        generator = DiscriminationGenerator(split, combinations="32-32-224", **SMALL)
        shown = generator.batch(0, 2048)
        objects[split] = set(
            zip(shown.shape.reshape(-1).tolist(), shown.color.reshape(-1).tolist(), strict=True)
        )
        assert all(allowed_combinations(split, "32-32-224")[pair] for pair in objects[split])
    assert len(objects["train"]) == 32
    assert objects["train"] == objects["val"] == objects["test_iid"]
    assert len(objects["test"]) == 224
    assert not objects["train"] & objects["test"]


DIGEST = """
import hashlib, sys
from vit_mechinterp.stimuli import CounterfactualGenerator, DiscriminationGenerator
options = dict(seed=5, combinations="32-32-224", canvas=64, patch=8, cell=16)
digest = hashlib.sha256()
batch = DiscriminationGenerator("test", **options).batch(100, 70)
for array in (batch.pixels, batch.label, batch.shape, batch.color, batch.box, batch.tokens):
    digest.update(array.tobytes())
for attribute in ("shape", "color"):
    pairs = CounterfactualGenerator(attribute, split="val", **options).batch(0, 64)
    for array in (pairs.base_pixels, pairs.source_pixels, pairs.source_objects):
        digest.update(array.tobytes())
sys.stdout.write(digest.hexdigest())
"""
KNOWN_DIGEST = "270dd747c9a0d991f04c4f3007a6e4f60517e289b384606d02bbffc03158b784"


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_every_process_makes_the_same_images(hash_seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is written down, so images on which a shipped checkpoint was trained cannot change
    unnoticed.
    """
    monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
    done = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    assert done.stdout == KNOWN_DIGEST


def test_the_dataset_shows_the_same_images_as_the_tensors() -> None:
    dataset = discrimination("test", 70, seed=2, canvas=64, patch=8, cell=16)
    batch = DiscriminationGenerator("test", seed=2, **SMALL).batch(0, 70)
    assert len(dataset) == 70
    for index, row in enumerate(dataset):
        assert np.array_equal(np.asarray(row["base"]).transpose(2, 0, 1), batch.pixels[index])
        assert row["label"] == batch.label[index]
        assert row["different_kind"] == ("none", "both", "shape", "color")[batch.different_kind[index]]
        for k, name in enumerate(("1", "2")):
            assert row[f"shape_{name}"] == batch.shape[index, k]
            assert row[f"color_{name}"] == batch.color[index, k]
            assert row[f"box_{name}"] == batch.box[index, k].tolist()
            assert row[f"object_{name}_tokens"] == batch.tokens[index, k].tolist()


def test_tensors_equal_the_librarys_transform_bit_for_bit() -> None:
    from timm.data import create_transform

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    dataset = discrimination("val", 8, canvas=64, patch=8, cell=16)
    for own, other in ((mean, std), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        transform = create_transform((3, 64, 64), interpolation="bicubic", crop_pct=1.0, mean=own, std=other)
        expected = torch.stack([transform(image) for image in dataset["base"]])
        generator = DiscriminationGenerator("val", normalization=Normalization(own, other), **SMALL)
        assert torch.equal(generator.batch(0, 8).images(), expected)


def test_columns_are_tensors_with_the_names_of_the_dataset(batch: DiscriminationBatch) -> None:
    columns = batch.columns()
    assert set(columns) == set(discrimination("train", 1, canvas=64, patch=8, cell=16).column_names)
    assert torch.equal(columns["base"], batch.images())
    assert columns["base"].dtype == torch.float32
    assert columns["object_2_tokens"].tolist() == batch.tokens[:, 1].tolist()


def test_the_papers_sizes_are_the_default() -> None:
    row = discrimination("val", 2)[1]
    assert row["base"].size == (224, 224)
    x0, y0, x1, y1 = row["box_1"]
    assert (x1 - x0, y1 - y0) == (32, 32)
    assert max(row["object_1_tokens"]) < 196
    digest = {
        hashlib.sha256(np.asarray(discrimination("val", 1)[0]["base"]).tobytes()).hexdigest()
        for _ in range(2)
    }
    assert len(digest) == 1


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(SpecError, match=r"n=0: ask for at least one image"):
        discrimination("train", 0)


def test_encoded_images_are_the_pixels() -> None:
    import io

    import numpy as np
    from PIL import Image

    from vit_mechinterp.stimuli.render import to_image_column

    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    column = to_image_column(pixels)
    decoded = [np.asarray(Image.open(io.BytesIO(image["bytes"]))).transpose(2, 0, 1) for image in column]
    assert np.array_equal(np.stack(decoded), pixels)
