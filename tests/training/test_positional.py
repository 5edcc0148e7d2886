"""The one-layer model of positional attention: its formula by hand, its gradient by finite differences, its symmetries."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli import SpatialBatch, SpatialStructure
from vit_mechinterp.training.positional import PositionalModel, fit, test_error

STRUCTURE = SpatialStructure.random(8, 2, dimension=6, rate=0.1, sigma=0.1, seed=2)


def stirred(power: int = 5) -> PositionalModel:
    """A model whose every parameter matters."""
    model = PositionalModel(8, 6, power=power).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.papers
def test_the_output_is_the_formula_written_out() -> None:
    model = PositionalModel(2, 3, power=3, slope=0.5)
    with torch.no_grad():
        model.logits.copy_(torch.tensor([[0.0, math.log(3)], [math.log(2), 0.0]]))
        model.value.copy_(torch.tensor([1.0, -1.0, 2.0]))
    patches = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]]])
    values = (3.0, -2.0)
    h = (0.25 * values[0] + 0.75 * values[1], 2 / 3 * values[0] + 1 / 3 * values[1])
    wanted = sum(z**3 + 0.5 * z for z in h)
    torch.testing.assert_close(model(patches), torch.tensor([wanted]))
    torch.testing.assert_close(model.attention.sum(-1), torch.ones(2))
    with pytest.raises(SpecError, match="an even power would lose the label's sign"):
        PositionalModel(2, 3, power=4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    model = stirred()
    batch = STRUCTURE.sample(6, seed=1)
    patches, label = batch.patches.double(), batch.label.double()

    def loss() -> torch.Tensor:
        return torch.log1p(torch.exp(-label * model(patches))).mean()

    loss().backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        exact = parameter.grad
        assert exact is not None
        assert exact.abs().max() > 1e-3
        flat = parameter.detach().reshape(-1)
        for index in range(0, flat.numel(), 5):
            with torch.no_grad():
                before = float(flat[index])
                sides = []
                for step in (1e-6, -1e-6):
                    flat[index] = before + step
                    sides.append(float(loss()))
                flat[index] = before
            assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(float(exact.reshape(-1)[index]), abs=1e-6)


def test_renaming_the_patches_changes_nothing() -> None:
    """Patches, sets and logits in another order are the same data and the same model, also after training."""
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    place = torch.argsort(order)
    train, test = STRUCTURE.sample(64, seed=1), STRUCTURE.sample(32, seed=2)
    moved = replace(STRUCTURE, sets=tuple(tuple(int(place[i]) for i in one) for one in STRUCTURE.sets))
    assert moved.sets != STRUCTURE.sets
    torch.testing.assert_close(moved.set_of, STRUCTURE.set_of[order])

    def permuted(batch: SpatialBatch) -> SpatialBatch:
        return replace(batch, patches=batch.patches[:, order])

    one, other = PositionalModel(8, 6, spread=0.5), PositionalModel(8, 6, spread=0.5)
    with torch.no_grad():
        other.logits.copy_(one.logits[order][:, order])
    torch.testing.assert_close(one(train.patches), other(permuted(train).patches))
    # Moving the patches alone does change it.
    assert (one(train.patches) - one(permuted(train).patches)).abs().max() > 1e-3
    feature = STRUCTURE.feature()
    traces = [
        fit(one, train, test, feature, steps=30, attention_rate=1.0),
        fit(other, permuted(train), permuted(test), feature, steps=30, attention_rate=1.0),
    ]
    torch.testing.assert_close(one.logits[order][:, order], other.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.value, other.value, rtol=1e-4, atol=1e-5)
    assert traces[0].test_error == traces[1].test_error
    assert traces[0].train_loss[-1] < traces[0].train_loss[0] - 0.01


def test_training_is_plain_gradient_descent_with_a_fixed_diagonal() -> None:
    train, test = STRUCTURE.sample(32, seed=1), STRUCTURE.sample(16, seed=2)
    model = PositionalModel(8, 6, spread=0.3, diagonal=0.7)
    logits, value = model.logits.detach().clone(), model.value.detach().clone()
    for _ in range(4):
        q, v = logits.clone().requires_grad_(), value.clone().requires_grad_()
        h = torch.einsum("ij,njd,d->ni", torch.exp(q) / torch.exp(q).sum(1, keepdim=True), train.patches, v)
        out = (h**5 + 0.03 * h).sum(1)
        torch.log1p(torch.exp(-train.label * out)).mean().backward()  # type: ignore[no-untyped-call]
        assert q.grad is not None
        assert v.grad is not None
        logits, value = logits - 2.0 * q.grad, value - 0.1 * v.grad
        logits.fill_diagonal_(0.7)
    trace = fit(model, train, test, STRUCTURE.feature(), steps=4, attention_rate=2.0, record_every=2)
    torch.testing.assert_close(model.logits.detach(), logits)
    torch.testing.assert_close(model.value.detach(), value)
    assert trace.steps == [0, 2, 4]
    assert trace.test_error[-1] == test_error(model, test)


def test_fixed_attention_stays_as_it_was_given() -> None:
    given = torch.randn(8, 8, generator=torch.Generator().manual_seed(6))
    model = PositionalModel.with_attention(given, 6)
    trace = fit(model, STRUCTURE.sample(32), STRUCTURE.sample(16, seed=1), STRUCTURE.feature(), steps=5, attention_rate=0, record_every=0)
    torch.testing.assert_close(model.logits.detach(), given, rtol=0, atol=0)
    assert trace.steps == [5]
