"""Stimuli by name, so that an experiment written as a document can ask for them:
``{stimuli: discrimination, split: test, n: 100}``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.stimuli.counterfactuals import counterfactuals
from vit_mechinterp.stimuli.discrimination import discrimination
from vit_mechinterp.stimuli.exchanges import object_exchanges
from vit_mechinterp.stimuli.realistic import realistic_discrimination
from vit_mechinterp.stimuli.rmts import rmts
from vit_mechinterp.stimuli.rmts_counterfactuals import rmts_counterfactuals
from vit_mechinterp.stimuli.spatial import spatially_structured

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["build", "builder", "names", "register"]

_BUILDERS: dict[str, Callable[..., Dataset]] = {
    "discrimination": discrimination,
    "discrimination_counterfactuals": counterfactuals,
    "discrimination_exchanges": object_exchanges,
    "realistic_discrimination": realistic_discrimination,
    "rmts": rmts,
    "rmts_counterfactuals": rmts_counterfactuals,
    "spatially_structured": spatially_structured,
}


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (Integral,),
    "float": (Real,),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
}


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value is of one of the plain kinds that an annotation names; any fits, where it names
    others.
    """
    kinds = annotation.split(" | ")
    if not set(kinds) <= set(_KINDS):
        return True
    if isinstance(value, bool):
        return "bool" in kinds
    return isinstance(value, tuple(kind for name in kinds for kind in _KINDS[name]))


def names() -> list[str]:
    """Return the names of all stimuli that `build` can make."""
    return sorted(_BUILDERS)


def register(name: str, builder: Callable[..., Dataset]) -> None:
    """Make ``builder``, a function of keyword options that returns a dataset, available as ``name``.

    Raises:
        SpecError: the name is taken by another builder.
    """
    if _BUILDERS.get(name, builder) is not builder:
        raise SpecError(f"The name {name!r} is taken by {_BUILDERS[name]!r}: choose another.")
    _BUILDERS[name] = builder


def builder(name: str) -> Callable[..., Dataset]:
    """Return the function that makes the stimuli ``name``; hyphens stand for underscores.

    Raises:
        SpecError: there are no such stimuli; the message lists those that exist.
    """
    found = _BUILDERS.get(name) or _BUILDERS.get(name.replace("-", "_"))
    if found is None:
        raise SpecError(
            f"There are no stimuli {name!r}. Stimuli: {', '.join(names())}.{suggest(name, _BUILDERS)}"
        )
    return found


def build(name: str, *, progress: bool = True, **options: Any) -> Dataset:
    """Make the stimuli ``name`` with the given options; ``progress`` is passed on to builders that take it.

    Raises:
        SpecError: there are no such stimuli, or they have no such option, or an option does not fit; the
            message says what there is.
    """
    function = builder(name)
    signature = inspect.signature(function)
    for option in options:
        if option not in signature.parameters:
            known = ", ".join(signature.parameters)
            raise SpecError(
                f"Stimuli {name!r} have no option {option!r}. Options: {known}."
                f"{suggest(option, signature.parameters)}"
            )
    if "progress" in signature.parameters:
        options["progress"] = progress
    try:
        signature.bind(**options)
    except TypeError as error:
        raise SpecError(f"Stimuli {name!r}: {error}. Options: {', '.join(signature.parameters)}.") from error
    for option, value in options.items():
        wanted = str(signature.parameters[option].annotation)
        if not _fits(value, wanted):
            raise SpecError(f"Stimuli {name!r}: {option} takes {wanted}, not {value!r}.")
    return function(**options)
