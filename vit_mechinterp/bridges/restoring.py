"""A model as it came: whatever another package does to a module's hooks, flags and forwards is undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["as_it_came"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def as_it_came(module: nn.Module) -> Iterator[None]:
    """On exit, also after an exception, put back what the module's instances held on entry.

    Hooks (the same ones, in the same order), train and eval flags, attributes that were added or replaced on
    instances, such as ``forward``, and ``requires_grad``. Values of parameters are not copied.
    """
    attributes: list[tuple[nn.Module, dict[str, Any], dict[str, dict[Any, Any]]]] = []
    for part in module.modules():
        own = vars(part)
        attributes.append((part, dict(own), {name: dict(own[name]) for name in _HOOKS}))
    gradients = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for part, before, hooks in attributes:
            own = vars(part)
            for name in [name for name in own if name not in before]:
                del own[name]
            own.update(before)
            for name, registered in hooks.items():
                own[name].clear()
                own[name].update(registered)
        for parameter, needed in gradients:
            parameter.requires_grad_(needed)
