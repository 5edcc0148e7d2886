"""The simplified vision transformer of Jelassi, Sander and Li (2022): attention by positions alone.

    F(X) = sum_i s(h_i),   h = softmax_rows(Q) X v,   s(z) = z^p + a z

with a matrix Q of attention logits ``[D, D]`` between positions, and a value vector v ``[d]``. ``p = 5`` and
``a = 0.03`` follow a third party's account of the authors' experiment, as do the initial values: a constant
diagonal of Q, held fixed, with everything else near zero. That they are the paper's own is not verified.

Several solutions generalise. With v along the feature, uniform attention (Q = 0) does where the noise is
weak: it averages over all patches, so the set that carries the label tips the mean. It knows nothing of sets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli.spatial import SpatialBatch

__all__ = ["PositionalModel", "TrainingTrace", "fit", "test_error"]


class PositionalModel(nn.Module):
    """One layer of positional attention.

    Args:
        n_patches: D.
        dimension: d.
        power: p, an odd number, so that the label's sign comes through.
        slope: a.
        diagonal: initial (and fixed) value of Q's diagonal; by default ``log(log(d))``.
        spread: standard deviation of all other initial values.
        seed: seeds them.

    Raises:
        SpecError: the power is even.
    """

    def __init__(
        self,
        n_patches: int,
        dimension: int,
        *,
        power: int = 5,
        slope: float = 0.03,
        diagonal: float | None = None,
        spread: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if power % 2 == 0:
            raise SpecError(f"power={power}: an even power would lose the label's sign; take an odd one.")
        self.power, self.slope = power, slope
        self.diagonal = math.log(math.log(dimension)) if diagonal is None else diagonal
        generator = torch.Generator().manual_seed(seed)
        logits = spread * torch.randn(n_patches, n_patches, generator=generator)
        self.logits = nn.Parameter(logits)
        self.value = nn.Parameter(spread * torch.randn(dimension, generator=generator))
        self.hold_diagonal()

    @classmethod
    @torch.no_grad()
    def with_attention(
        cls, logits: Float[Tensor, "patch patch"], dimension: int, *, seed: int = 0
    ) -> PositionalModel:
        """Return a model with these attention logits, diagonal included, and a value vector near zero.

        Zeros are uniform attention, which generalises without patch association; the logits of a trained
        model transfer its structure. Train it with ``attention_rate=0``.
        """
        model = cls(len(logits), dimension, seed=seed)
        model.logits.copy_(logits)
        return model

    @torch.no_grad()
    def hold_diagonal(self) -> None:
        """Put the diagonal of the logits back to its fixed value."""
        self.logits.fill_diagonal_(self.diagonal)

    @property
    def attention(self) -> Float[Tensor, "patch patch"]:
        """The attention between positions; rows sum to 1."""
        return self.logits.softmax(dim=-1)

    def forward(self, patches: Float[Tensor, "example patch feature"]) -> Float[Tensor, " example"]:
        """Return F, whose sign is the predicted label."""
        h = (patches @ self.value) @ self.attention.T
        return (h**self.power + self.slope * h).sum(dim=-1)


@dataclass
class TrainingTrace:
    """What was seen during training, at every recorded step.

    Attributes:
        steps: when.
        train_loss: mean logistic loss.
        test_error: share of wrong answers.
        cosine: between the value vector and the feature.
        attention: between positions.
    """

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_error: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    attention: list[Float[Tensor, "patch patch"]] = field(default_factory=list)


def fit(
    model: PositionalModel,
    train: SpatialBatch,
    test: SpatialBatch,
    feature: Float[Tensor, " feature"],
    *,
    steps: int = 300,
    learning_rate: float = 0.1,
    attention_rate: float | None = None,
    record_every: int = 10,
    record_first: int = 0,
    progress: bool = False,
) -> TrainingTrace:
    """Train by full-batch gradient descent on the logistic loss ``mean log(1 + exp(-y F))``.

    Args:
        model: trained in place.
        train, test: examples.
        feature: the feature vector, for the cosine with the value vector.
        steps: gradient steps.
        learning_rate: of the value vector.
        attention_rate: of the attention logits, whose gradients are much smaller; None for the same, 0 to
            keep them (and their diagonal) as they are.
        record_every: steps between entries of the trace; 0 for the last step alone.
        record_first: steps at the start that have an entry each, since much happens in them.
        progress: show a bar if it takes longer than two seconds.
    """
    rate = learning_rate if attention_rate is None else attention_rate
    groups = [{"params": [model.value], "lr": learning_rate}]
    if rate:
        groups.append({"params": [model.logits], "lr": rate})
    optimizer = torch.optim.SGD(groups)
    trace = TrainingTrace()
    for step in tqdm(range(steps + 1), desc="gradient descent", delay=2, disable=not progress):
        loss = functional.softplus(-train.label * model(train.patches)).mean()
        if step == steps or step < record_first or (record_every and step % record_every == 0):
            trace.steps.append(step)
            trace.train_loss.append(float(loss.detach()))
            trace.test_error.append(test_error(model, test))
            cosine = functional.cosine_similarity(model.value.detach(), feature, dim=0)
            trace.cosine.append(float(cosine))
            trace.attention.append(model.attention.detach().clone())
        if step < steps:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if rate:
                model.hold_diagonal()
    return trace


@torch.no_grad()
def test_error(model: PositionalModel, batch: SpatialBatch) -> float:
    """Return the share of examples whose label the model gets wrong."""
    return float((model(batch.patches).sign() != batch.label).float().mean())


# It is no test, whatever its name says to pytest.
test_error.__test__ = False  # type: ignore[attr-defined]
