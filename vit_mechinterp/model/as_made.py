"""Whether a model is as its library made it: its own modules and methods, and nobody else's hooks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

__all__ = ["are_untouched", "is_as_made", "is_untouched"]

_LIBRARIES = frozenset({"open_clip", "timm", "torch", "torchvision", "transformers", "vit_mechinterp"})
"""Packages whose modules do the same with every input, whatever their numbers are."""
_RECORDERS = "transformers."
"""Recording hooks of transformers stay on a module once used; they keep nothing unless they are asked to."""


def is_as_made(module: nn.Module) -> bool:
    """Whether a model consists of its library's own modules and methods, and nobody has touched them.

    Hooks and forwards of the user's would see tokens that are not computed; and what code of the user's reads
    of other tokens may depend on the data, so that trying it out proves little.
    """
    if not is_untouched(module):
        return False
    kinds = {type(part) for part in module.modules()}
    bases: set[type] = {base for kind in kinds for base in kind.__mro__ if base is not object}
    methods = (value for base in bases for value in vars(base).values() if isinstance(value, FunctionType))
    owners = {_library(code) for kind in kinds for code in (kind, kind.forward)}
    return owners <= _LIBRARIES and all(_library(method) in _LIBRARIES for method in methods)


def is_untouched(module: nn.Module) -> bool:
    """Whether there are no hooks on a model, and no attribute of a part stands in for one of its methods."""
    return are_untouched(module.modules())


def are_untouched(parts: Iterable[nn.Module]) -> bool:
    """Whether there are no hooks on some modules, and no attribute of theirs stands in for a method."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return False
    for part in parts:
        kind: Any = type(part)
        if not _methods(kind).isdisjoint(vars(part)):
            return False
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
            if not (getattr(hook, "__module__", None) or "").startswith(_RECORDERS):
                return False
    return True


@lru_cache(maxsize=1024)
def _methods(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the functions of a class and of those that it is made from."""
    return frozenset(
        name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, FunctionType)
    )


def _library(code: Any) -> str:
    """The top-level package that a class or function comes from."""
    return str(getattr(code, "__module__", "")).partition(".")[0]
