"""A metric that has been checked and bound to the examples at hand, before the long work starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.metrics import METRICS, Context, LogitDifference, Metric, MetricLike, Similarity
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["BoundMetric", "Checked", "bind_metric", "check_metric"]

Checked: TypeAlias = "Metric | Callable[[Tensor], Tensor]"
"""A metric that is no name."""


@dataclass(frozen=True)
class BoundMetric:
    """A metric that knows its classes and has been tried.

    Attributes:
        name, label: for tables and axes.
        description: one sentence on what is read.
        clean: its numbers on the clean outputs, ``[example]``.
        other: its numbers on the outputs of the comparison; None without one.
    """

    name: str
    label: str
    description: str
    function: Callable[[Tensor], Tensor] = field(repr=False)
    clean: Float[Tensor, " example"] = field(repr=False)
    other: Float[Tensor, " example"] | None = field(default=None, repr=False)

    def __call__(self, outputs: Float[Tensor, "example *output"]) -> Float[Tensor, " example"]:
        """The numbers of all examples, in float64."""
        return self.function(outputs.double()).double()


def check_metric(metric: MetricLike | None, vit: HookedViT, data: Any) -> Checked:
    """Return the metric meant (None: logit difference for classes, cosine for features), checked cheaply.

    Runs one blank image, to learn the shape of the output.

    Raises:
        SpecError: there is no such metric, it does not fit the output, or a class is out of range.
    """
    with torch.no_grad():
        shape = tuple(vit(vit.blank(1)).shape[1:])
    if metric is None:
        metric = LogitDifference() if _are_classes(vit, shape) else Similarity()
    if isinstance(metric, str):
        if metric not in METRICS:
            raise SpecError(
                f"There is no metric {metric!r}.{suggest(metric, METRICS)} Metrics: {', '.join(METRICS)}, or "
                "a function from outputs [example, classes] to numbers [example]."
            )
        metric = METRICS[metric]()
    if isinstance(metric, Metric):
        metric.check(Data(data, vit), shape)
    elif not callable(metric):
        raise SpecError(f"A metric is a name or a function of the outputs, not {metric!r}.")
    return metric


def bind_metric(
    metric: Checked,
    vit: HookedViT,
    data: Any,
    clean: Float[Tensor, "example *output"],
    other: Float[Tensor, "example *output"] | None = None,
) -> BoundMetric:
    """Fix a metric's classes by the outputs of the clean images, and try it on them.

    Args:
        metric: what `check_metric` returned.
        vit: the model.
        data: the examples.
        clean: outputs of the clean images.
        other: outputs of the images that they are compared with.

    Raises:
        SpecError: the metric gives something else than one finite number per example.
    """
    if isinstance(metric, Metric):
        function, description = metric.bind(Context(Data(data, vit), clean, other))
        name, label = metric.label.split(" (")[0].replace(" ", "_"), metric.label
    else:
        function, name = metric, getattr(metric, "__name__", type(metric).__name__)
        name = "metric" if name == "<lambda>" else name
        label, description = name.replace("_", " "), f"The function {name}."
    here = _tried(function, name, clean, "clean")
    there = None if other is None else _tried(function, name, other, "corrupted")
    return BoundMetric(name, label, description, function, here, there)


def _tried(function: Callable[[Tensor], Tensor], name: str, outputs: Tensor, where: str) -> Tensor:
    n = len(outputs)
    try:
        with torch.no_grad():
            values = function(outputs.double())
    except Exception as error:
        raise SpecError(
            f"The metric {name} fails on the {where} images' outputs {tuple(outputs.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(values, Tensor) or tuple(values.shape) != (n,):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise SpecError(
            f"The metric {name} must turn outputs {tuple(outputs.shape)} into one number per example, "
            f"({n},); on the {where} images it gives {got}."
        )
    if not bool(values.isfinite().all()):
        example = int((~values.isfinite()).nonzero()[0])
        raise SpecError(
            f"The metric {name} gives {float(values[example])} on the {where} image of example {example}, "
            "so no effect on it could be measured."
        )
    return values.double()


def _are_classes(vit: HookedViT, shape: tuple[int, ...]) -> bool:
    return vit.layout.output == "logits" and len(shape) == 1 and shape[0] > 1
