"""The order of hooks on one module's output: ours among themselves, and before or behind those of others."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["hook_output"]

_OWN: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


def hook_output(module: nn.Module, hook: Callable[..., Any], *, first: bool) -> RemovableHandle:
    """Register a forward hook behind those that were registered here before.

    Args:
        module: the module whose output the hook is given.
        hook: as torch takes it.
        first: whether it comes before hooks of others, which keep what they see (transformers' recorders).
    """
    handle = module.register_forward_hook(hook, prepend=first)
    if first:
        hooks = cast("OrderedDict[int, Callable[..., Any]]", module._forward_hooks)
        for key, other in reversed(list(hooks.items())):
            if key != handle.id and other in _OWN:
                hooks.move_to_end(key, last=False)
    _OWN.add(hook)
    return handle
