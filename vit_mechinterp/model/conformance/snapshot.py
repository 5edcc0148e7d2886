"""Everything about a module that a caller would not want changed: before and after can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vit_mechinterp.model.fingerprint import fingerprint

__all__ = ["differences", "snapshot"]


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Hooks, flags, attributes, forwards, configuration, parameters, gradients and weights, by place."""
    facts: dict[str, Any] = {"weights": fingerprint(module)}
    for path, part in module.named_modules():
        where = path or type(module).__name__
        own = vars(part)
        facts[f"{where}: train mode"] = part.training
        facts[f"{where}: attributes"] = sorted(own)
        facts[f"{where}: forward"] = id(own["forward"]) if "forward" in own else None
        facts[f"{where}: attention implementation"] = (
            own.get("fused_attn"),
            getattr(own.get("config"), "_attn_implementation", None),
        )
        for name, value in own.items():
            if "hooks" in name and isinstance(value, Mapping):
                facts[f"{where}: {name}"] = [(key, id(hook)) for key, hook in value.items()]
        for name, parameter in part.named_parameters(recurse=False):
            facts[f"{where}.{name}: requires_grad"] = parameter.requires_grad
            facts[f"{where}.{name}: parameter"] = id(parameter)
            facts[f"{where}.{name}: gradient"] = id(parameter.grad) if parameter.grad is not None else None
    return facts


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The places at which two snapshots differ."""
    return [place for place in {**before, **after} if before.get(place, ...) != after.get(place, ...)]
