"""What an intervention says beyond what its bound edit holds."""

from __future__ import annotations

from functools import cache

from vit_mechinterp.engine.bound import Edit, fields_of
from vit_mechinterp.spec import Ablate, Intervention, SourcedIntervention, TensorRef

__all__ = ["options_of"]

_NUMBERS = (bool, int, float)
_PLAIN = (str, bool, int, float)
"""Types of fields that are compared as they are."""


def options_of(edit: Edit, *, imagined: bool) -> object:
    """Every field of an intervention that is not resolved into the bound edit, to be compared by.

    With ``imagined``, nobody knows what columns select, and selectors are compared by what they say.
    """
    spec = edit.spec
    resolved = _resolved(type(spec), imagined, edit.choice is not None, edit.source is not None)
    own = {name: getattr(spec, name) for name in fields_of(type(spec)) if name not in resolved}
    # The edit holds tensors by field, under one name for equal contents.
    own = {name: None if isinstance(value, TensorRef) else value for name, value in own.items()}
    if all(value is None or type(value) in _PLAIN for value in own.values()):
        # Told apart by type and by how they are written, as in a document: 1.0 is not "1.0", nor 1 True.
        return tuple(
            (name, type(value), repr(value)) if type(value) in _NUMBERS else (name, value)
            for name, value in own.items()
        )
    return spec.model_dump_json(include={name for name, value in own.items() if value is not None})


@cache
def _resolved(kind: type[Intervention], imagined: bool, chosen: bool, sourced: bool) -> frozenset[str]:
    """Fields whose meaning the bound edit holds."""
    resolved = set() if imagined else {"site", "tokens", "heads", "keys"}
    if issubclass(kind, SourcedIntervention) and not imagined:
        resolved |= {"source", "source_tokens", "source_site"}
    if chosen and not imagined:
        resolved.add("choose")
    if issubclass(kind, Ablate) and sourced:
        resolved.add("seed")
    return frozenset(resolved)
