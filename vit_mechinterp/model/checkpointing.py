"""Gradient checkpointing runs blocks a second time for the backward pass, when hooks are gone."""

from __future__ import annotations

from torch import nn

from vit_mechinterp.errors import ExecutionError

__all__ = ["refuse_checkpointing"]


def refuse_checkpointing(module: nn.Module) -> None:
    """Raise ExecutionError if a part of a module would run again, without visitors, in a backward pass.

    timm's switch works in every mode, transformers' in train mode alone.
    """
    for path, part in module.named_modules():
        own = vars(part)
        if own.get("grad_checkpointing") or (own.get("gradient_checkpointing") and part.training):
            raise ExecutionError(
                f"{path or type(part).__name__} uses gradient checkpointing: its blocks run again in the "
                "backward pass, when visitors are gone. Switch it off, or run under torch.no_grad(); timm "
                "has set_grad_checkpointing(False) for it, transformers gradient_checkpointing_disable()."
            )
