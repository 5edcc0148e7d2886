"""Whether a module would drop activations at random."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["dropping"]

# Names under which torch, timm and transformers keep the rate at which a module drops activations.
DROP_RATES = ("p", "prob", "drop_prob", "dropout", "attention_dropout")


def dropping(module: nn.Module) -> str | None:
    """Path of a part that is in train mode and would drop activations at random, or None."""
    path: str
    for path, part in module.named_modules():
        if part.training and any(_rate(part, name) > 0 for name in DROP_RATES):
            return path
    return None


def _rate(module: nn.Module, name: str) -> float:
    value: Any = getattr(module, name, 0.0)
    return float(value) if isinstance(value, (int, float)) else 0.0
