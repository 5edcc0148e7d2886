"""Images in one sequence: taken apart and put together, and arguments of blocks for rows that joined."""

from __future__ import annotations

import torch
from torch import nn

from vit_mechinterp.model.packing import Packing, Rows

PLACES = (0, 1, 4, 5, 2, 3, 6, 7)  # a grid of 2 x 4, in groups of 2 x 2
PACKING = Packing(PLACES, outputs=2)
BLOCK = nn.Identity()


def test_a_sequence_is_taken_apart_and_put_together() -> None:
    sequence = torch.randn(24, 3)
    rows = PACKING.unpack(sequence)
    assert rows.shape == (3, 8, 3)
    for image in range(3):
        for token, place in enumerate(PLACES):
            assert torch.equal(rows[image, token], sequence[8 * image + place])
    assert torch.equal(PACKING.pack(rows), sequence)
    heads = torch.randn(16, 2, 5)
    assert torch.equal(PACKING.pack(PACKING.unpack(heads)), heads)


def test_tokens_in_order_are_not_copied() -> None:
    packing = Packing(tuple(range(8)), outputs=8)
    sequence = torch.randn(16, 3)
    assert packing.unpack(sequence).data_ptr() == sequence.data_ptr()


def test_outputs_by_image() -> None:
    assert PACKING.split(torch.zeros(6, 5)).shape == (3, 2, 5)
    assert Packing(PLACES, outputs=2, leading=True).split(torch.zeros(1, 6, 5)).shape == (3, 2, 5)
    assert Rows(outputs=2).split(torch.zeros(6, 5)).shape == (3, 2, 5)


def arguments(n_images: int) -> dict[str, object]:
    """Two stretches an image, of 3 and of 5 tokens; positions that tell the tokens apart."""
    ends = torch.tensor([0, *(8 * i + end for i in range(n_images) for end in (3, 8))], dtype=torch.int32)
    positions = torch.arange(8.0).repeat(n_images)[:, None].expand(-1, 4)
    return {"cu_seqlens": ends, "position_embeddings": (positions, 2 * positions), "max_seqlen": None}


def test_arguments_follow_the_rows() -> None:
    for given, wanted in [(1, 3), (4, 2), (2, 5)]:
        args, kwargs = PACKING.fit(BLOCK, (torch.zeros(8 * wanted, 3),), arguments(given))
        expected = arguments(wanted)
        assert args[0].shape == (8 * wanted, 3)
        assert torch.equal(kwargs["cu_seqlens"], expected["cu_seqlens"])
        assert kwargs["cu_seqlens"].dtype == torch.int32
        for found, right in zip(kwargs["position_embeddings"], expected["position_embeddings"], strict=True):
            assert torch.equal(found, right)
        assert kwargs["max_seqlen"] is None


def test_arguments_that_fit_are_left_alone() -> None:
    assert PACKING.fit(BLOCK, (torch.zeros(16, 3),), arguments(2)) is None
    assert PACKING.fit(BLOCK, (torch.zeros(1, 16, 3),), arguments(2)) is None


def test_a_sequence_given_by_name_stays_as_it_is() -> None:
    sequence = torch.randn(24, 3)
    args, kwargs = PACKING.fit(BLOCK, (), {"hidden_states": sequence, **arguments(1)})
    assert args == ()
    assert kwargs["hidden_states"] is sequence
    assert kwargs["cu_seqlens"].tolist() == [0, 3, 8, 11, 16, 19, 24]


def test_stretches_of_one_image() -> None:
    assert PACKING.stretches(torch.tensor([0, 3, 8, 11, 16])) == [0, 3, 8]
    assert PACKING.stretches(torch.tensor([0, 8, 16])) == [0, 8]


def test_positions_by_row_follow_the_rows() -> None:
    positions, mask = torch.randn(1, 8, 2).expand(3, -1, -1), torch.ones(3, 1, 8, 8)
    kwargs = {"position_ids": positions, "both": (positions, positions), "attention_mask": mask, "scale": 2.0}
    value = torch.zeros(5, 8, 4)
    args, fitting = Rows(outputs=2).fit(BLOCK, (value,), kwargs)
    assert args[0] is value
    assert fitting["position_ids"].shape == (5, 8, 2)
    assert torch.equal(fitting["both"][1][4], positions[0])
    assert fitting["attention_mask"].shape == (5, 1, 8, 8)
    assert fitting["scale"] == 2.0
    one = {"position_ids": positions[:1]}
    assert Rows(outputs=2).fit(BLOCK, (value,), one)[1]["position_ids"] is one["position_ids"]
