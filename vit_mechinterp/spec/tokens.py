"""Token selectors: which tokens of an activation an intervention or a capture means.

In a document a selector is one of

* a name: ``"all"``, ``"cls"``, ``"registers"``, ``"patches"``, or any other name of the model's token layout;
* a list mixing such names and patch indices (row-major over the grid, prefix tokens never counted);
* ``{"column": name}``: patch indices per example, from that column of the data;
* ``{"box": name}``: a pixel box per example, ``(x0, y0, x1, y1)``, half-open, in the original image's pixels;
  it selects every patch that it touches.

A selector is free of any model: names and indices are checked against the token layout when a plan is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec.base import SpecModel, as_index, nested

__all__ = ["Column", "TokenBox", "TokenColumn", "Tokens", "parse_tokens"]

_Name = Annotated[str, Field(min_length=1)]


class TokenColumn(SpecModel):
    """Patch indices per example, from a column of the data that holds ``[example, k]`` integers."""

    column: _Name


class TokenBox(SpecModel):
    """Every patch that a per-example pixel box ``(x0, y0, x1, y1)`` touches, from a column of the data."""

    box: _Name


class Column(SpecModel):
    """An integer per example, from a column of the data (``choose`` picks a row of a tensor by it)."""

    column: _Name


def parse_tokens(value: Any) -> str | tuple[str | int, ...] | TokenColumn | TokenBox:
    """Read a selector from its document form; raises SpecError for anything that is none."""
    if isinstance(value, (TokenColumn, TokenBox)):
        return value
    if isinstance(value, str):
        return _name(value)
    if isinstance(value, Mapping):
        if set(value) == {"column"}:
            return nested(TokenColumn, dict(value))
        if set(value) == {"box"}:
            return nested(TokenBox, dict(value))
        raise _malformed(value)
    if hasattr(value, "__index__"):
        return (as_index(value),)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        if len(value) == 0:
            raise SpecError(
                "An empty list selects no token; leave the intervention out, or name at least one token."
            )
        if "all" in value:
            raise SpecError("'all' already means every token: write it alone, not in a list.")
        return tuple(_name(item) if isinstance(item, str) else as_index(item) for item in value)
    raise _malformed(value)


def _name(value: str) -> str:
    if not value:
        raise SpecError("A token name cannot be empty.")
    return value


def _malformed(value: Any) -> SpecError:
    return SpecError(
        f"{value!r} selects no tokens. Write a name ('all', 'cls', 'patches', ...), a list of names and "
        "patch indices, {'column': name} or {'box': name}."
    )


Tokens: TypeAlias = Annotated[
    str | tuple[str | int, ...] | TokenColumn | TokenBox,
    BeforeValidator(parse_tokens, json_schema_input_type=str | list[str | int] | TokenColumn | TokenBox),
]
"""A token selector, read by :func:`parse_tokens` and dumped in the same form."""
