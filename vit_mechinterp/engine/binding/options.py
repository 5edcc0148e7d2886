"""What an intervention says beyond what its bound edit holds."""

from __future__ import annotations

from functools import cache

from vit_mechinterp.engine.binding.bound import Edit
from vit_mechinterp.spec import Ablate, Intervention, SourcedIntervention, TensorRef
from vit_mechinterp.spec.named import fields_of

__all__ = ["options_of"]

_NUMBERS = (bool, int, float)
"""Types of fields that are told apart by type and by how they are written, as in a document: 1.0 is not
"1.0", nor 1 True."""


def options_of(edit: Edit, *, imagined: bool) -> object:
    """Every field of an intervention that is not resolved into the bound edit, to be compared by.

    With ``imagined``, nobody knows what columns select, and selectors are compared by what they say.
    """
    spec = edit.spec
    names = _compared(type(spec), imagined, edit.choice is not None, edit.source is not None)
    own: list[object] = []
    for name in names:
        value = getattr(spec, name)
        if value is None or isinstance(value, TensorRef):  # the edit holds tensors, under one name each
            own.append(None)
        elif type(value) is str:
            own.append(value)
        elif type(value) in _NUMBERS:
            own.append((type(value), repr(value)))
        else:
            return spec.model_dump_json(include=_told(spec, names))
    return names, *own


def _told(spec: Intervention, names: tuple[str, ...]) -> set[str]:
    """Those of some fields that say something which is no tensor."""
    return {name for name in names if not isinstance(getattr(spec, name), (TensorRef, type(None)))}


@cache
def _compared(kind: type[Intervention], imagined: bool, chosen: bool, sourced: bool) -> tuple[str, ...]:
    """Fields whose meaning the bound edit does not hold."""
    resolved = set() if imagined else {"site", "tokens", "heads", "keys"}
    if issubclass(kind, SourcedIntervention) and not imagined:
        resolved |= {"source", "source_tokens", "source_site"}
    if chosen and not imagined:
        resolved.add("choose")
    if issubclass(kind, Ablate) and sourced:
        resolved.add("seed")
    return tuple(name for name in fields_of(kind) if name not in resolved)
