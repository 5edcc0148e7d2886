"""The stimuli at the sizes of the paper's models: ViT-B/16, B/32 and DINOv2's B/14, 224 px."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from vit_mechinterp.stimuli import (
    CounterfactualGenerator,
    DiscriminationGenerator,
    RMTSCounterfactualGenerator,
    RMTSGenerator,
    shape_masks,
)

pytestmark = pytest.mark.papers

# Patch, cell, patches along a side of the canvas and of a cell, drawn size, largest shift.
SIZES = {"B/16": (16, 32, 14, 2, 24, 8), "B/32": (32, 32, 7, 1, 24, 8), "B/14": (14, 28, 16, 2, 21, 7)}


@pytest.mark.parametrize("model", SIZES)
def test_images_of_both_tasks_fit_the_patch_grid(model: str) -> None:
    patch, cell, grid, span, drawn, most = SIZES[model]
    for make, n_objects in ((DiscriminationGenerator, 2), (RMTSGenerator, 4)):
        batch = make("train", canvas=224, patch=patch, cell=cell).batch(0, 64)
        assert batch.pixels.shape == (64, 3, 224, 224)
        assert batch.tokens.shape == (64, n_objects, span**2)
        assert batch.label.mean() == 0.5
        shifts = set()
        for index in range(64):
            covered = batch.tokens[index].reshape(-1)
            assert len(set(covered)) == n_objects * span**2
            assert 0 <= covered.min() <= covered.max() < grid**2
            white = batch.pixels[index].min(axis=0) == 255
            for (x0, y0, x1, y1), tokens, shape in zip(batch.box[index], batch.tokens[index], batch.shape[index], strict=True):
                assert (x0 % patch, y0 % patch, x1 - x0, y1 - y0) == (0, 0, cell, cell)
                steps = itertools.product(range(span), repeat=2)
                assert tokens.tolist() == [(y0 // patch + row) * grid + x0 // patch + column for row, column in steps]
                rows, columns = np.nonzero(~white[y0:y1, x0:x1])
                mask = shape_masks(drawn)[shape]
                assert len(rows) == mask.sum()
                shifts |= {rows.min() - np.nonzero(mask)[0].min(), columns.min() - np.nonzero(mask)[1].min()}
                white[y0:y1, x0:x1] = True
            assert white.all()
        assert shifts == set(range(most + 1))
        if n_objects == 4:
            assert {tuple(corner) for corner in batch.box[:, 2:, :2].reshape(-1, 2)} == {(0, 0), (cell, 0)}
            assert [int(members.sum()) for members in batch.groups().values()] == [16] * 4


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("make", [CounterfactualGenerator, RMTSCounterfactualGenerator])
def test_counterfactual_pairs_fit_it_too(model: str, make: Any) -> None:
    patch, cell, grid, span, _, _ = SIZES[model]
    batch = make("color", split="test", combinations="32-32-224", canvas=224, patch=patch, cell=cell).batch(0, 16)
    columns = batch.metadata()
    assert columns["label"].mean() == 0.5
    assert np.array_equal(columns["counterfactual_label"], 1 - columns["label"])
    for name in ("edited", "source", "other", "source_other"):
        boxes, tokens = columns[f"{name}_box"], columns[f"{name}_tokens"]
        assert tokens.shape == (16, span**2)
        assert (boxes[:, :2] % patch == 0).all()
        assert (boxes[:, 2:] - boxes[:, :2] == cell).all()
        assert np.array_equal(tokens[:, 0], boxes[:, 1] // patch * grid + boxes[:, 0] // patch)
    assert not (columns["edited_box"] == columns["other_box"]).all(axis=1).any()
