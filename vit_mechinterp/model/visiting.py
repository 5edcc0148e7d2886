"""Let a visitor see, and replace, the tensor at a port, in the shape that the site's name promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_mechinterp.model.ports import Port, Share

__all__ = ["contribution", "hand_on", "hand_on_tuple", "laid_out_as", "replace_input", "replace_output"]


def replace_input(
    port: Port, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    name = None if args else next(iter(kwargs))
    value = args[0] if name is None else kwargs[name]
    if port.in_place:
        # Visitors are given a copy: what one of them keeps must not change when another one writes.
        given = value.clone()
        writes = _writes(given)
        new = _visit(port, given, visit)
        if new is not given or writes is None or _writes(given) != writes:
            value.copy_(new)
        return None
    new = _visit(port, value, visit)
    if new is value:
        return None
    new = laid_out_as(value, new)
    return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})


def _writes(x: Tensor) -> int | None:
    """How often a tensor was written to; None where nobody counts, or where autograd has to see a copy."""
    return None if x.requires_grad or x.is_inference() else x._version


def replace_output(port: Port, output: Any, visit: Callable[[Tensor], Tensor]) -> Any:
    if port.field is not None:
        value = output[port.field]
        new = _visit(port, value, visit)
        if new is not value:
            # A copy, so that the caller's view of the native output type is kept and nothing else changes.
            output = type(output)(**{**output, port.field: new})
        return output
    if isinstance(output, tuple):
        return (_visit(port, output[0], visit), *output[1:])
    return _visit(port, output, visit)


def laid_out_as(value: Tensor, new: Tensor) -> Tensor:
    """The replacement in the memory layout of what it replaces: what kernels round depends on it."""
    if new.shape != value.shape or new.stride() == value.stride() or 0 in value.stride():
        return new
    return torch.empty_strided(value.shape, value.stride(), dtype=new.dtype, device=new.device).copy_(new)


def _visit(port: Port, value: Tensor, visit: Callable[[Tensor], Tensor]) -> Tensor:
    """Visit the part of a tensor that a port means, and put it back."""
    if port.packing is not None:
        packing, port = port.packing, replace(port, packing=None)
        rows = packing.unpack(value.flatten(0, -2))  # some have a leading axis of one
        new = _visit(port, rows, visit)
        if new is rows and not value.requires_grad:
            return value
        return packing.pack(new).reshape(*value.shape[:-2], -1, new.shape[-1])
    if port.spatial:
        seen = value.flatten(1, 2)
    elif port.head_first:
        seen = _in_heads(value.transpose(1, 2).flatten(2), port.head_shape)
    elif port.token_first:
        seen = value.transpose(0, 1)
    elif port.heads is not None or port.part is not None:
        start, stop = _span(port, value.shape[-1])
        seen = value[..., start:stop]
        if port.heads is not None:
            seen = _in_heads(seen, port.head_shape)
    else:
        return visit(value)
    new = visit(seen)
    # Under autograd what was seen is handed on, so that the gradient of the output reaches it.
    if new is seen and not value.requires_grad:
        return value
    if port.spatial:
        return new.reshape(len(new), *value.shape[1:3], new.shape[-1])
    if port.head_first:
        return _in_heads(new.flatten(2), (value.shape[1], value.shape[3])).transpose(1, 2)
    if port.token_first:
        return new.transpose(0, 1)
    if port.heads is not None:
        new = new.flatten(-2)
    return torch.cat([value[..., :start], new, value[..., stop:]], dim=-1)


def _in_heads(x: Tensor, shape: tuple[int, int]) -> Tensor:
    return x.reshape(*x.shape[:-1], *shape)


def _span(port: Port, width: int) -> tuple[int, int]:
    """First and last (excluded) feature of the part that is meant."""
    if port.heads is not None:
        own = port.head_shape[0] * port.head_shape[1]
        return (0, own) if port.heads == "first" else (width - own, width)
    assert port.part is not None
    index, count = port.part
    each = -(-width // count)
    return index * each, min((index + 1) * each, width)


def contribution(share: Share, projection: nn.Linear, features: Tensor) -> Tensor:
    """What a linear layer makes of the input features that belong to one share of a sum."""
    if share.inputs == "all":
        return F.linear(features, projection.weight, projection.bias)
    if share.inputs == "first":
        own = slice(0, share.n_first)
        return F.linear(features[..., own], projection.weight[:, own], projection.bias)
    own = slice(share.n_first, None)
    return F.linear(features[..., own], projection.weight[:, own])


def hand_on(*args: Any, **kwargs: Any) -> Any:
    """The forward of a block that is skipped."""
    return args[0] if args else next(iter(kwargs.values()))


def hand_on_tuple(*args: Any, **kwargs: Any) -> tuple[Any, None]:
    """The same for blocks that return tuples: the stream, and no attention weights."""
    return hand_on(*args, **kwargs), None
