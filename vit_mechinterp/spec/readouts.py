"""Readouts as data: what is kept of every output of a model that gives one logit per class.

Each is a frozen pydantic model, told apart by ``op``. A class is a number, the same for every example, or a
column of the data that holds one number per example; a plain string stands for ``{"column": string}``.
"""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec.base import TaggedSpec, as_index, by_op, nested
from vit_mechinterp.spec.tokens import Column

__all__ = ["READOUTS", "AnyReadout", "CrossEntropy", "Readout", "SelectedLogits", "parse_readout"]


def _class(value: Any) -> int | Column:
    if isinstance(value, Column):
        return value
    if isinstance(value, str):
        return nested(Column, {"column": value})
    if isinstance(value, Mapping) and set(value) == {"column"}:
        return nested(Column, dict(value))
    if hasattr(value, "__index__") and not getattr(value, "ndim", 0):
        return as_index(value)
    raise SpecError(
        f"{reprlib.repr(value)} is no class. Write its number, or the name of a column of the data that "
        "holds one class per example."
    )


def _classes(value: Any) -> tuple[int | Column, ...]:
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    classes = tuple(map(_class, value if several else [value]))
    if not classes:
        raise SpecError("An empty list selects no class; leave readout out to keep the logits of all.")
    names = [_name(entry) for entry in classes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SpecError(f"classes names {', '.join(twice)} twice.")
    return classes


def _name(entry: int | Column) -> str:
    return entry.column if isinstance(entry, Column) else str(entry)


Class: TypeAlias = Annotated[
    int | Column, BeforeValidator(_class, json_schema_input_type=int | str | Column)
]
Classes: TypeAlias = Annotated[
    tuple[int | Column, ...],
    BeforeValidator(_classes, json_schema_input_type=int | str | Column | list[int | str | Column]),
]


class Readout(TaggedSpec, ABC):
    """What all readouts have: names for the numbers that they keep, and the class that each is about."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """A name for each number, as columns of tables have it."""

    @property
    @abstractmethod
    def read(self) -> tuple[int | Column, ...]:
        """The class that each number is about."""

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns of the data that hold classes."""
        return frozenset(entry.column for entry in self.read if isinstance(entry, Column))


class CrossEntropy(Readout):
    """``-log softmax(logits)[answer]``: each example's loss, in nats, as one number."""

    op: Literal["cross_entropy"] = "cross_entropy"
    answer: Class

    @property
    def names(self) -> tuple[str, ...]:
        """See `Readout`."""
        return ("cross_entropy",)

    @property
    def read(self) -> tuple[int | Column, ...]:
        """See `Readout`."""
        return (self.answer,)


class SelectedLogits(Readout):
    """``logits[classes]``: the logits of some classes, in the order in which they are given."""

    op: Literal["selected_logits"] = "selected_logits"
    classes: Classes

    @property
    def names(self) -> tuple[str, ...]:
        """See `Readout`."""
        return tuple(f"logit_{_name(entry)}" for entry in self.classes)

    @property
    def read(self) -> tuple[int | Column, ...]:
        """See `Readout`."""
        return self.classes


READOUTS: dict[str, type[CrossEntropy] | type[SelectedLogits]] = {
    "cross_entropy": CrossEntropy,
    "selected_logits": SelectedLogits,
}
"""Every readout by its ``op``."""


def parse_readout(value: Any) -> CrossEntropy | SelectedLogits:
    """Read a readout from its document form; raises SpecError for anything that is none."""
    if isinstance(value, (CrossEntropy, SelectedLogits)):
        return value
    return by_op(value, READOUTS, "readout")


AnyReadout: TypeAlias = Annotated[
    CrossEntropy | SelectedLogits, Field(discriminator="op"), BeforeValidator(parse_readout)
]
"""Any readout; in a document, a mapping with its ``op``."""
