"""The disentanglement loss, against the formula written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from vit_mechinterp.errors import SpecError
from vit_mechinterp.training import DisentanglementProbes

D_MODEL, BATCH, TOKENS = 6, 3, 10


@pytest.fixture
def probes() -> DisentanglementProbes:
    torch.manual_seed(0)
    return DisentanglementProbes(D_MODEL)


def by_hand(
    probes: DisentanglementProbes,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    shape: torch.Tensor,
    color: torch.Tensor,
) -> tuple[float, float]:
    shape_losses, color_losses = [], []
    for image in range(len(hidden)):
        for k in range(2):
            for position in tokens[image, k].tolist():
                vector = hidden[image, position]
                for losses, probe, half, target in (
                    (shape_losses, probes.shape, vector[: D_MODEL // 2], shape[image, k]),
                    (color_losses, probes.color, vector[D_MODEL // 2 :], color[image, k]),
                ):
                    logits = (probe.weight @ half + probe.bias).tolist()
                    losses.append(math.log(sum(math.exp(x) for x in logits)) - logits[int(target)])
    return sum(shape_losses) / len(shape_losses), sum(color_losses) / len(color_losses)


def test_both_terms_equal_the_formula(probes: DisentanglementProbes) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH, TOKENS, D_MODEL, generator=generator)
    tokens = torch.stack(
        [torch.randperm(TOKENS, generator=generator)[:8].reshape(2, 4) for _ in range(BATCH)]
    )
    shape, color = torch.randint(0, 16, (2, BATCH, 2), generator=generator)
    terms = probes(hidden, tokens, shape, color)
    expected = by_hand(probes, hidden, tokens, shape, color)
    assert terms.shape.item() == pytest.approx(expected[0], rel=1e-5)
    assert terms.color.item() == pytest.approx(expected[1], rel=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_each_term_reaches_its_own_half_of_object_tokens_alone(probes: DisentanglementProbes) -> None:
    tokens = torch.tensor([[[1, 2], [5, 6]]])
    ids = torch.tensor([[3, 4]])
    for name, own, other in (("shape", slice(0, 3), slice(3, 6)), ("color", slice(3, 6), slice(0, 3))):
        hidden = torch.randn(
            1, TOKENS, D_MODEL, generator=torch.Generator().manual_seed(2), requires_grad=True
        )
        getattr(probes(hidden, tokens, ids, ids), name).backward()
        assert hidden.grad is not None
        moved = hidden.grad[0, :, own].abs().sum(dim=-1) > 0
        assert torch.nonzero(moved).reshape(-1).tolist() == [1, 2, 5, 6]
        assert not hidden.grad[0, :, other].any()


def test_accuracies_count_tokens(probes: DisentanglementProbes) -> None:
    with torch.no_grad():
        for probe in (probes.shape, probes.color):
            probe.weight.zero_()
            probe.bias.copy_(torch.arange(16.0))
    hidden = torch.zeros(2, TOKENS, D_MODEL)
    tokens = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    terms = probes(hidden, tokens, torch.tensor([[15, 0], [15, 15]]), torch.tensor([[0, 0], [0, 15]]))
    assert float(terms.shape_accuracy) == 0.75
    assert float(terms.color_accuracy) == 0.25


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(SpecError, match=r"halves the embedding, whose width is 7: use an even width"):
        DisentanglementProbes(7)
