"""Gradient checkpointing runs blocks a second time for the backward pass, when hooks are gone."""

from __future__ import annotations

from torch import nn

from vit_mechinterp.errors import ExecutionError

__all__ = ["refuse_checkpointing"]


def refuse_checkpointing(module: nn.Module) -> None:
    """Raise ExecutionError if a part of a module would run again, without visitors, in a backward pass.

    timm's switch works in every mode, transformers' in train mode alone.
    """
    # Every forward with gradients asks, so the way down takes no names along.
    left, seen = [module], {id(module)}
    while left:
        part = left.pop()
        if _checkpoints(part):
            path = next(path for path, own in module.named_modules() if _checkpoints(own))
            raise ExecutionError(
                f"{path or type(part).__name__} uses gradient checkpointing: its blocks run again in the "
                "backward pass, when visitors are gone. Switch it off, or run under torch.no_grad(); timm "
                "has set_grad_checkpointing(False) for it, transformers gradient_checkpointing_disable()."
            )
        for own in part._modules.values():
            if own is not None and id(own) not in seen:
                seen.add(id(own))
                left.append(own)


def _checkpoints(part: nn.Module) -> bool:
    own = part.__dict__
    return bool(own.get("grad_checkpointing") or (own.get("gradient_checkpointing") and part.training))
