"""What is measured on the outputs of a model: one number per example.

A metric is a name, one of the classes below, or any function from outputs ``[example, *output]`` to numbers
``[example]``. Functions see the outputs of all examples at once, in order, so they may close over labels; the
number of an example may depend on its own output only.

`vit_mechinterp.circuits.bound_metric` checks a metric before the long work starts: classes against the
model's output, the function on the clean outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError

__all__ = [
    "METRICS",
    "Accuracy",
    "Classes",
    "Context",
    "KLDivergence",
    "LogitDifference",
    "Metric",
    "MetricLike",
    "Probability",
    "Rank",
    "Similarity",
    "one_class",
]

Classes: TypeAlias = "int | str | Sequence[int] | None"
"""A class for all examples, the name of a column of classes, or one class per example."""


@dataclass(frozen=True)
class Context:
    """What a metric is bound to: the outputs of the clean images, and of those they are compared with."""

    data: Data
    clean: Float[Tensor, "example *output"]
    other: Float[Tensor, "example *output"] | None


@runtime_checkable
class Metric(Protocol):
    """A metric that still has to learn its classes."""

    @property
    def label(self) -> str:
        """What the numbers are, for an axis."""

    def check(self, data: Data, shape: tuple[int, ...]) -> None:
        """Raise SpecError unless the metric fits outputs of this shape (per example)."""

    def bind(self, context: Context) -> tuple[Callable[[Tensor], Tensor], str]:
        """Return the function from outputs to numbers, and a sentence that says which classes it reads."""


@dataclass(frozen=True)
class LogitDifference:
    """Logit of ``answer`` minus logit of ``other``.

    By default ``answer`` is the class that the model predicts for the clean image, and ``other`` the one that
    it predicts for the image of the comparison; where these are one class (or there is no such image), the
    next best class there.
    """

    answer: Classes = None
    other: Classes = None
    label: str = field(default="logit difference", init=False)

    def check(self, data: Data, shape: tuple[int, ...]) -> None:
        """See `Metric`."""
        _classes(self.answer, data, shape, "answer")
        _classes(self.other, data, shape, "other")

    def bind(self, context: Context) -> tuple[Callable[[Tensor], Tensor], str]:
        """See `Metric`."""
        answer = _answers(self.answer, context)
        shape = tuple(context.clean.shape[1:])
        other = _classes(self.other, context.data, shape, "other")
        words = _said(self.other, "class")
        if other is None:
            there = context.clean if context.other is None else context.other
            other = there.scatter(1, answer[:, None], -torch.inf).argmax(dim=1)
            image = "clean" if context.other is None else "corrupted"
            words = f"the best other class of the {image} image"
        if bool((other == answer).any()):
            example = int((other == answer).nonzero()[0])
            raise SpecError(
                f"The logit difference compares class {int(answer[example])} with itself in example "
                f"{example}. Give different classes as answer and other."
            )
        rows = torch.arange(len(answer))

        def difference(outputs: Tensor) -> Tensor:
            here = rows.to(outputs.device)
            return outputs[here, answer.to(outputs.device)] - outputs[here, other.to(outputs.device)]

        return difference, f"The logit of {_said_answer(self.answer)} minus that of {words}."


@dataclass(frozen=True)
class Probability:
    """Softmax probability of ``answer`` (by default the prediction for the clean image), or its logarithm."""

    answer: Classes = None
    log: bool = False

    @property
    def label(self) -> str:
        """See `Metric`."""
        return "log probability" if self.log else "probability"

    def check(self, data: Data, shape: tuple[int, ...]) -> None:
        """See `Metric`."""
        _classes(self.answer, data, shape, "answer")

    def bind(self, context: Context) -> tuple[Callable[[Tensor], Tensor], str]:
        """See `Metric`."""
        answer = _answers(self.answer, context)

        def probability(outputs: Tensor) -> Tensor:
            log = outputs.log_softmax(dim=1).gather(1, answer.to(outputs.device)[:, None])[:, 0]
            return log if self.log else log.exp()

        return probability, f"The {self.label} of {_said_answer(self.answer)}."


@dataclass(frozen=True)
class KLDivergence:
    """Kullback-Leibler divergence from the clean output's distribution to the present one, in nats."""

    label: str = field(default="KL divergence (nats)", init=False)

    def check(self, data: Data, shape: tuple[int, ...]) -> None:
        """See `Metric`."""
        _logits(shape, "The KL divergence")

    def bind(self, context: Context) -> tuple[Callable[[Tensor], Tensor], str]:
        """See `Metric`."""
        clean = context.clean.double().log_softmax(dim=1)

        def divergence(outputs: Tensor) -> Tensor:
            target = clean.to(outputs)
            return F.kl_div(outputs.log_softmax(dim=1), target, reduction="none", log_target=True).sum(dim=1)

        return divergence, "The divergence from the clean image's distribution over classes."


@dataclass(frozen=True)
class Rank:
    """Rank of ``answer`` among all classes, 0 for the first; without gradient."""

    answer: Classes = None
    label: str = field(default="rank", init=False)

    def check(self, data: Data, shape: tuple[int, ...]) -> None:
        """See `Metric`."""
        _classes(self.answer, data, shape, "answer")

    def bind(self, context: Context) -> tuple[Callable[[Tensor], Tensor], str]:
        """See `Metric`."""
        answer = _answers(self.answer, context)

        def rank(outputs: Tensor) -> Tensor:
            own = outputs.gather(1, answer.to(outputs.device)[:, None])
            return (outputs > own).sum(dim=1).to(outputs.dtype)

        return rank, f"The rank of {_said_answer(self.answer)}, 0 for the first."


@dataclass(frozen=True)
class Accuracy:
    """1 where ``answer`` (by default the prediction for the clean image) is predicted, else 0."""

    answer: Classes = None
    label: str = field(default="accuracy", init=False)

    def check(self, data: Data, shape: tuple[int, ...]) -> None:
        """See `Metric`."""
        _classes(self.answer, data, shape, "answer")

    def bind(self, context: Context) -> tuple[Callable[[Tensor], Tensor], str]:
        """See `Metric`."""
        answer = _answers(self.answer, context)

        def hits(outputs: Tensor) -> Tensor:
            return (outputs.argmax(dim=1) == answer.to(outputs.device)).to(outputs.dtype)

        return hits, f"Whether {_said_answer(self.answer)} is predicted: 1, else 0."


@dataclass(frozen=True)
class Similarity:
    """Cosine between the present output and the clean one: for models that give features, not classes."""

    label: str = field(default="cosine to the clean output", init=False)

    def check(self, data: Data, shape: tuple[int, ...]) -> None:
        """See `Metric`."""

    def bind(self, context: Context) -> tuple[Callable[[Tensor], Tensor], str]:
        """See `Metric`."""
        clean = context.clean.double().flatten(1)
        return (
            lambda outputs: F.cosine_similarity(outputs.flatten(1), clean.to(outputs), dim=1),
            "The cosine between the output and that of the clean image.",
        )


METRICS: dict[str, Callable[[], Metric]] = {
    "logit_difference": LogitDifference,
    "probability": Probability,
    "log_probability": lambda: Probability(log=True),
    "kl": KLDivergence,
    "rank": Rank,
    "accuracy": Accuracy,
    "cosine": Similarity,
}
"""Metrics by their short names, with their defaults."""

MetricLike: TypeAlias = "str | Metric | Callable[[Tensor], Tensor]"
"""A metric by name, by value, or as a function of the outputs."""


def _logits(shape: tuple[int, ...], what: str) -> int:
    if len(shape) != 1 or shape[0] < 2:
        raise SpecError(
            f"{what} needs one output per class, at least two; this model gives {shape} per image. Take the "
            "metric 'cosine', or a function of your own."
        )
    return shape[0]


def _classes(value: Classes, data: Data, shape: tuple[int, ...], what: str) -> Int[Tensor, " example"] | None:
    """One class per example, or None where it was left open."""
    n_classes = _logits(shape, f"The metric's {what}")
    if value is None:
        return None
    if isinstance(value, str):
        rows = data.one_integer(value, f"the metric's {what}")
    elif (number := one_class(value)) is not None:
        rows = [number] * data.n
    else:
        try:
            rows = [operator.index(entry) for entry in cast("Sequence[int]", value)]
        except TypeError:
            raise SpecError(
                f"{what}={value!r} is no class: give a number, the name of a column, or one number per "
                "example."
            ) from None
        if len(rows) != data.n:
            raise SpecError(f"{what} names {len(rows)} classes for {data.n} examples; give one per example.")
    for example, entry in enumerate(rows):
        if not 0 <= entry < n_classes:
            raise SpecError(
                f"{what}: class {entry} of example {example} is out of range; the model has classes 0 to "
                f"{n_classes - 1}."
            )
    return torch.tensor(rows)


def one_class(value: Any) -> int | None:
    """Return the class that is meant for all examples, whether Python, NumPy or PyTorch made the number; None
    if the value is not one whole number.
    """
    if getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _answers(value: Classes, context: Context) -> Int[Tensor, " example"]:
    given = _classes(value, context.data, tuple(context.clean.shape[1:]), "answer")
    return context.clean.argmax(dim=1) if given is None else given


def _said_answer(value: Classes) -> str:
    return "the class predicted for the clean image" if value is None else _said(value, "class")


def _said(value: Classes, what: str) -> str:
    if isinstance(value, str):
        return f"the {what} in column {value!r}"
    number = one_class(value)
    return f"the given {what}" if number is None else f"{what} {number}"
