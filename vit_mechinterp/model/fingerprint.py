"""The identity of a model: one digest over what decides its outputs."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

__all__ = ["fingerprint"]

# Attributes that say how or where a module runs, or where it came from, and not what it computes.
_CIRCUMSTANCES = frozenset(
    {"training", "fused_attn", "grad_checkpointing", "gradient_checkpointing", "name_or_path"}
)

_KNOWN: dict[bytes, str] = {}
"""SHA-256 of contents that were seen before, by their XXH3-128, which is read several times as fast.

The tensors' identities and version counters would be quicker still, and wrong: a weight written through
``.data`` or by another process leaves no trace on them.
"""
_MOST_KNOWN = 65536


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over a module's structure and weights, wherever they are kept.

    Structure is every submodule's class and its plain attributes, such as a number of heads, which weights
    alone do not show. Every weight is looked at in every call, so a change is always seen.
    """
    digest = hashlib.sha256()
    for path, part in module.named_modules():
        digest.update(f"{path}:{type(part).__qualname__}{_settings(part)}\n".encode())
    tensors = {name: x for name, x in module.state_dict().items() if isinstance(x, Tensor)}
    with ThreadPoolExecutor() as pool:
        for name, content in zip(tensors, pool.map(_digest, tensors.values()), strict=True):
            digest.update(f"{name}:{content}\n".encode())
    return digest.hexdigest()


def _digest(x: Tensor) -> str:
    content = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    quick = xxhash.xxh3_128_digest(content)
    if quick not in _KNOWN:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[quick] = hashlib.sha256(content).hexdigest()
    return f"{tuple(x.shape)} {x.dtype} {_KNOWN[quick]}"


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    names = sorted(set(vars(module)) - _CIRCUMSTANCES)
    return [(name, vars(module)[name]) for name in names if name[0] != "_" and _is_plain(vars(module)[name])]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
