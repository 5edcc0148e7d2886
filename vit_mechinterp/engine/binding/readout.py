"""Readouts, bound to a model and its data: what is kept of outputs where not all of their logits are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Column, CrossEntropy, Readout, SelectedLogits

__all__ = ["BoundReadout", "bind_readout"]


@dataclass(frozen=True, eq=False)
class BoundReadout:
    """A readout whose classes are known: a function from outputs to what is kept of them.

    Args:
        spec: the readout.
        classes: for each number that it keeps, the class of every example.
    """

    spec: Readout
    classes: tuple[NDArray[np.int64], ...]

    @property
    def size(self) -> int:
        """Numbers that are kept of one output."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is kept of one output."""
        return () if isinstance(self.spec, CrossEntropy) else (self.size,)

    def __call__(
        self, outputs: Float[Tensor, "row class"], examples: NDArray[np.int64]
    ) -> Float[Tensor, "row *readout"]:
        """What is kept of some rows, ``[row]`` or ``[row, k]``; ``examples`` says whose each is."""
        own = np.stack([classes[examples] for classes in self.classes], axis=1)
        chosen = torch.from_numpy(own).to(outputs.device)
        if isinstance(self.spec, CrossEntropy):
            # In float64, so that the loss of an answer that is all but certain is not rounded to 0.
            loss = F.cross_entropy(outputs.double(), chosen[:, 0], reduction="none")
            return loss.to(outputs.dtype)
        return outputs.gather(1, chosen)


def bind_readout(vit: HookedViT, readout: Readout | None, data: Data | None) -> BoundReadout | None:
    """Find and check the classes of a readout; without data, columns are not looked at.

    Raises:
        SpecError: it is no readout, the model's output is not one logit per class, or has no such class.
        DataError: a column is missing, or holds something else than one class of the model per example.
    """
    if readout is None:
        return None
    if not isinstance(readout, (CrossEntropy, SelectedLogits)):
        raise SpecError(
            f"readout is a CrossEntropy, a SelectedLogits or None, not {readout!r}. A document of "
            "one is read as part of an Experiment."
        )
    where, n_classes = f"readout {readout.op}", _classes_of(vit, readout)
    n = 1 if data is None else data.n
    found = []
    for entry in readout.read:
        if isinstance(entry, int) and entry >= n_classes:
            raise SpecError(f"{where}: class {entry} is out of range; {_there_are(n_classes)}.")
        if isinstance(entry, Column) and data is not None:
            found.append(_column(data, entry.column, n_classes, where))
        else:
            found.append(np.broadcast_to(np.int64(0 if isinstance(entry, Column) else entry), n))
    return BoundReadout(readout, tuple(found))


def _classes_of(vit: HookedViT, readout: Readout) -> int:
    """How many classes the model's output has."""
    if (site := vit.sites().get("logits")) is not None:
        shape = site.shape
    else:
        with vit.lock, torch.no_grad():
            shape = tuple(vit(vit.blank(1)).shape[1:])
    if vit.layout.output != "logits" or len(shape) != 1 or shape[0] < 2:
        raise SpecError(
            f"readout {readout.op} reads one logit per class, and {type(vit.module).__name__} gives "
            f"{vit.layout.output} of shape {shape} per example. Leave readout out to keep whole outputs, or "
            "take a model with a classification head."
        )
    return shape[0]


def _column(data: Data, column: str, n_classes: int, where: str) -> NDArray[np.int64]:
    classes = np.array(data.one_integer(column, where), dtype=np.int64)
    wrong = (classes < 0) | (classes >= n_classes)
    if wrong.any():
        example = int(wrong.argmax())
        raise DataError(
            f"{where}: column {column!r}, example {example}: class {classes[example]} is out of range; "
            f"{_there_are(n_classes)}. Give a column of the model's own numbers of classes."
        )
    return classes


def _there_are(n_classes: int) -> str:
    return f"the model has classes 0 to {n_classes - 1}"
