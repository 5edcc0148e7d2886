"""Modules on the meta device have shapes and no numbers: they can be described, and not run."""

from __future__ import annotations

from torch import nn

from vit_mechinterp.errors import ExecutionError

__all__ = ["refuse_meta"]


def refuse_meta(module: nn.Module) -> None:
    """Raise ExecutionError if a module's first parameter is on the meta device."""
    if next(module.parameters()).is_meta:
        raise ExecutionError(
            f"{type(module).__name__} stands on the meta device and has no weights: make it without "
            "torch.device('meta'), or bring it to a device (module.to_empty(device=...)) and load them."
        )
