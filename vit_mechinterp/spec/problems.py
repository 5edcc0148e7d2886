"""pydantic's validation errors as errors of the tree: one line ``where: path.of.key: what`` per problem."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

from pydantic import ValidationError

from vit_mechinterp.errors import SpecError, suggest

__all__ = ["as_spec_error"]

# Messages that say all there is to say; to others the input is added.
_COMPLETE = ("value_error", "unknown_field", "missing", "extra_forbidden")


def as_spec_error(error: ValidationError, where: str, fields: Iterable[str]) -> SpecError:
    """Return what pydantic collected as one SpecError; ``fields`` are the keys at the top."""
    lines = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
            message = f"There is no such key.{suggest(key, fields)} Keys: {', '.join(fields)}."
        elif problem["type"] not in _COMPLETE:
            message += f"; got {reprlib.repr(problem['input'])}."
        lines.append(": ".join(part for part in (where, key, message) if part))
    return SpecError("\n".join(lines))
