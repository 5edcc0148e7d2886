"""What specs name: their fields, sources and columns."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from vit_mechinterp.spec.ops import Intervention, RunSource
from vit_mechinterp.spec.runs import Capture, Run
from vit_mechinterp.spec.tokens import Column, TokenBox, TokenColumn

__all__ = ["fields_of", "selecting_columns", "source_of"]


def source_of(spec: Intervention) -> str | RunSource | None:
    """The source that an intervention names; None for one that has none."""
    if "source" not in fields_of(type(spec)):
        return None
    source: str | RunSource | None = getattr(spec, "source")  # noqa: B009
    return source


@cache
def fields_of(kind: type[Intervention | Capture]) -> tuple[str, ...]:
    """Names of the fields of a kind of intervention or capture."""
    return tuple(kind.model_fields)


def selecting_columns(run: Run) -> Iterator[str]:
    """Names of the columns that a run's selectors and choices read, whatever the fields are called."""
    for part in (*run.interventions, *run.capture):
        for field in fields_of(type(part)):
            value = getattr(part, field)
            if isinstance(value, (Column, TokenColumn)):
                yield value.column
            elif isinstance(value, TokenBox):
                yield value.box
