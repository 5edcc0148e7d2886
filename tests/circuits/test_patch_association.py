"""Patch association: scores by hand, positional attention against the module's own parts, phases and transfer at tiny size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics.pairwise import cosine_similarity
from timm.models.vision_transformer import VisionTransformer

import vit_mechinterp as vmi
from tests.tiny_models import stirred
from vit_mechinterp.circuits import (
    association_phases,
    patch_association,
    positional_comparison,
    structure_transfer,
)
from vit_mechinterp.circuits.association import association, members_of, neighbourhoods
from vit_mechinterp.circuits.patch_association import encoding_similarity, positional_attention_matrix
from vit_mechinterp.circuits.positional_comparison import trained_vits
from vit_mechinterp.errors import DataError, SpecError, UnsupportedModelError
from vit_mechinterp.model import positional_attention
from vit_mechinterp.stimuli import SpatialStructure
from vit_mechinterp.training.classifier import ClassifierSettings
from vit_mechinterp.training.image_sets import image_set


@pytest.fixture(scope="module")
def module() -> VisionTransformer:
    torch.manual_seed(0)
    module = VisionTransformer(img_size=24, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    return stirred(module).eval()


def test_scores_are_those_counted_by_hand() -> None:
    members = members_of([(0, 2), (1, 3)])
    matrix = torch.tensor([[9, 1, 5, 2], [5, 9, 1, 2], [3, 2, 1, 0], [0, 7, 1, 2]]).float()
    # Top two of every row: {0, 2}, {1, 0}, {0, 1}, {1, 3}. Nearest other: 2, 0, 0, 1.
    scores = association(matrix, members)
    assert float(scores["agreement"]) == pytest.approx((2 + 1 + 1 + 2) / 8)
    assert float(scores["exact"]) == 0.5
    assert float(scores["corrected"]) == pytest.approx(((1 - 1 / 3) / (2 / 3) * 3 + (0 - 1 / 3) / (2 / 3)) / 4)
    twice = association(torch.stack([matrix, members.float()]), members)
    assert twice["exact"].tolist() == [0.5, 1.0]
    with pytest.raises(DataError, match="the last two axes are the same patches"):
        association(matrix[:, :3], members)
    with pytest.raises(DataError, match="more than one patch and fewer than all"):
        association(matrix, torch.ones(4, 4, dtype=torch.bool))


def test_a_random_order_scores_nothing_and_the_sets_everything() -> None:
    members = neighbourhoods((5, 6))
    assert members.sum(1).tolist() == [
        (min(r + 1, 4) - max(r - 1, 0) + 1) * (min(c + 1, 5) - max(c - 1, 0) + 1) for r in range(5) for c in range(6)
    ]
    noise = torch.rand(500, 30, 30, generator=torch.Generator().manual_seed(0))
    noise += 10 * torch.eye(30)
    scores = association(noise, members)
    # A patch that attends to itself has an agreement far above chance, and a corrected score of none.
    assert float(scores["agreement"].mean()) > 0.3
    assert float(scores["corrected"].mean()) == pytest.approx(0, abs=0.01)
    perfect = association(members.float(), members)
    assert [float(perfect[name]) for name in ("agreement", "exact", "corrected")] == [1, 1, 1]


def test_scores_do_not_depend_on_the_names_of_patches() -> None:
    members = members_of([(0, 3, 4), (1, 2, 5)])
    matrix = torch.rand(6, 6, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    moved = association(matrix[order][:, order], members[order][:, order])
    for name, score in association(matrix, members).items():
        assert float(score) == pytest.approx(float(moved[name]))
    mixed = association(matrix[order][:, order], members)
    assert float(mixed["agreement"]) != float(moved["agreement"])


def test_equal_entries_count_as_the_mean_over_their_orders() -> None:
    """Uniform attention knows no sets, whatever its patches are called; brute force over orders of the equal ones."""
    members = members_of([(0, 3), (1, 4), (2, 5)])
    uniform = association(torch.full((6, 6), 1 / 6), members)
    assert float(uniform["agreement"]) == pytest.approx(2 / 6)
    assert float(uniform["corrected"]) == pytest.approx(0, abs=1e-6)
    assert float(uniform["exact"]) == 0
    matrix = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0, 1.0]).repeat(6, 1)
    noise = torch.rand(4000, 6, 6, generator=torch.Generator().manual_seed(5)) * 1e-3
    broken = association(matrix + noise, members)
    tied = association(matrix, members)
    for name in ("agreement", "corrected"):
        assert float(tied[name]) == pytest.approx(float(broken[name].mean()), abs=0.01)
    with pytest.raises(DataError, match="infinite or NaN"):
        association(torch.full((6, 6), torch.nan), members)


def test_similarity_is_the_cosine_of_encodings(module: VisionTransformer) -> None:
    found = encoding_similarity(vmi.wrap(module)).numpy()
    rows = module.pos_embed.detach().numpy()[0, 1:]
    np.testing.assert_allclose(found, cosine_similarity(rows), atol=1e-5)
    assert found.min() < -0.1


def test_positional_attention_is_the_block_s_own_on_encodings(module: VisionTransformer) -> None:
    found = positional_attention_matrix(vmi.wrap(module), 1)
    # Encodings alone: an image that the stem maps to nothing, so that the stream is the table (and the class token).
    stream = module.pos_embed.clone()
    stream[:, 0] += module.cls_token[0]
    block = module.blocks[1]
    q, k, _ = block.attn.qkv(block.norm1(stream)).reshape(10, 3, 2, 12).permute(1, 2, 0, 3)
    pattern = (q @ k.transpose(1, 2) / 12**0.5).softmax(-1)[:, 1:, 1:]
    torch.testing.assert_close(found, (pattern / pattern.sum(-1, keepdim=True)).detach(), rtol=1e-4, atol=1e-6)
    assert found.std(dim=-1).min() > 1e-4


def test_in_a_positional_vit_it_is_the_attention_itself(module: VisionTransformer) -> None:
    vit = vmi.wrap(positional_attention(module))
    images = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    _, cache = vit.run(images, capture=["blocks.1.attn.pattern"])
    pattern = cache["blocks.1.attn.pattern"][0, :, 1:, 1:]
    torch.testing.assert_close(positional_attention_matrix(vit, 1), (pattern / pattern.sum(-1, keepdim=True)).detach())


def test_a_real_model_is_scored_layer_by_layer(module: VisionTransformer) -> None:
    vit = vmi.wrap(module)
    result = patch_association(vit, progress=False)
    assert len(result.table) == 1 + 2 * 2
    assert result.tensors["attention"].shape == (2, 2, 9, 9)
    assert set(result.figures()) == {"similarity", "attention", "scores"} == set(result.captions)
    row = result.table.iloc[0]
    similarity = result.tensors["similarity"]
    others = ~torch.eye(9, dtype=torch.bool)
    assert row["above"] == pytest.approx(float(((similarity > 0.55) & others).sum()) / 72)
    known = patch_association(vit, sets=[(0, 1, 2), (3, 4, 5), (6, 7, 8)], layers=[1], progress=False)
    assert known.table["layer"].dropna().unique().tolist() == [1]
    with pytest.raises(SpecError, match="no layer 2"):
        patch_association(vit, layers=[2])
    with pytest.raises(SpecError, match="The sets hold 4 patches, the model has 9"):
        patch_association(vit, sets=[(0, 1), (2, 3)])
    with torch.device("meta"):
        rotary = vmi.wrap(timm.create_model("vit_base_patch16_rope_224"))
    with pytest.raises(UnsupportedModelError, match="adds no table of positional encodings"):
        patch_association(rotary)


@pytest.mark.papers
def test_it_generalises_first_associates_later_and_transfers() -> None:
    """The claims of the paper, at 36 patches: both reach their ends, in that order, and the structure is worth examples."""
    structure = SpatialStructure.random(36, 6, dimension=36)
    phases = association_phases(structure, examples=1000, test_examples=500, steps=400, attention_rate=20.0, progress=False)
    end = phases.table.iloc[-1]
    assert end["test_error"] <= 0.01
    assert end["exact"] == 1.0
    assert end["corrected"] == pytest.approx(1.0)
    assert int(phases.summary["generalises from step"]) < int(phases.summary["associates from step"])
    assert phases.table["corrected"].iloc[0] < 0.2
    members = members_of(structure.sets)
    attention = phases.tensors["attention_end"]
    assert float((attention * members).sum(-1).mean()) == pytest.approx(end["own_set"])
    assert set(phases.figures()) == {"phases", "attention"} == set(phases.captions)

    transfer = structure_transfer(
        structure, phases.tensors["logits"], samples=(20, 100), repeats=2, steps=150, test_examples=500, progress=False
    )
    means = transfer.table.groupby(["samples", "arm"])["accuracy"].mean().unstack("arm")
    assert (means["exact association"] > means["without association"] + 0.02).all()
    assert (means["pretrained"] > means["without association"]).all()
    assert (means["pretrained"] > means["from scratch"]).all()
    assert set(transfer.figures()) == {"transfer"} == set(transfer.captions)
    with pytest.raises(DataError, match="has 36 patches"):
        structure_transfer(structure, torch.zeros(3, 3))


def test_models_are_compared_on_held_out_images() -> None:
    images = image_set("digits")
    assert (len(images.train), len(images.test), images.n_classes, images.size) == (1437, 360, 10, 8)
    settings = ClassifierSettings(patch=4, width=12, depth=1, heads=2, steps=60, batch_size=32)
    models = trained_vits(images, settings, progress=False)
    result = positional_comparison(models, images, settings)
    for row in result.table.to_dict("records"):
        own: Any = models[row["kind"]][row["seed"]]
        with torch.no_grad():
            right = own(images.test).argmax(-1) == images.test_labels
        assert row["test_accuracy"] == pytest.approx(float(right.float().mean()))
        # The interval of a share of n independent images is near the normal one.
        half = 1.96 * (row["test_accuracy"] * (1 - row["test_accuracy"]) / 360) ** 0.5
        assert row["test_low"] == pytest.approx(row["test_accuracy"] - half, abs=0.01)
        assert row["test_high"] == pytest.approx(row["test_accuracy"] + half, abs=0.01)
    with pytest.raises(SpecError, match="no model of the kind 'ViT'"):
        positional_comparison({"ViT": []}, images)
    assert result.table["test_accuracy"].min() > 0.15
    assert set(result.figures()) == {"accuracy"}
    with pytest.raises(SpecError, match=r"no image set or folder 'digit'.*Close matches: digits"):
        image_set("digit")
