"""Other ways to carry out bound runs, by name; bridges register themselves when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Protocol

from torch import Tensor

from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.results.results import Results
from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TensorRef

__all__ = ["BACKENDS", "Backend", "backend_named", "register_backend"]


class Backend(Protocol):
    """Carries out checked, bound runs; refuses what it cannot express before it runs anything."""

    def __call__(
        self,
        vit: HookedViT,
        bound: Bound,
        data: Data,
        tensors: Mapping[TensorRef, Tensor],
        *,
        batch_size: int,
        progress: bool,
    ) -> Results:
        """Outputs (of which ``bound.readout`` says what is kept) and captures of all runs."""


BACKENDS: dict[str, Backend] = {}
"""Registered backends by name."""

_BUILT_IN = {
    "hooks": "vit_mechinterp.bridges.hooks",
    "nnsight": "vit_mechinterp.bridges.nnsight",
    "pyvene": "vit_mechinterp.bridges.pyvene",
    "transformer_lens": "vit_mechinterp.bridges.transformer_lens_runs",
}


def register_backend(name: str) -> Callable[[Backend], Backend]:
    """Decorator: let ``execute(..., backend=name)`` carry out runs with the function."""

    def decorate(backend: Backend) -> Backend:
        BACKENDS[name] = backend
        return backend

    return decorate


def backend_named(name: str) -> Backend:
    """The backend of that name; its module is imported if it is one of ours.

    Raises:
        SpecError: there is none of that name, or its package is not installed.
    """
    if name not in BACKENDS and name in _BUILT_IN:
        try:
            import_module(_BUILT_IN[name])
        except ImportError as error:
            raise SpecError(
                f"backend={name!r} needs a package that cannot be imported: {error}. "
                "Install it with: pip install 'vit-mechinterp[bridges]'."
            ) from error
    if name not in BACKENDS:
        known = dict.fromkeys([*_BUILT_IN, *BACKENDS])
        raise SpecError(
            f"There is no backend {name!r}.{suggest(name, known)} Known: {', '.join(known)}; leave it out "
            "for the engine."
        )
    return BACKENDS[name]
