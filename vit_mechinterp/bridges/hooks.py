"""The plain backend: PyTorch's own hooks, and one patched function, on the native module, one run at a time.

Module boundaries are reached by forward hooks. The attention call is reached by putting a function that says
what it computes in the place of ``torch.nn.functional.scaled_dot_product_attention`` during the forward.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_mechinterp.bridges.boundaries import Step, inside_attention, steps, z_port
from vit_mechinterp.bridges.sequential import Forward, Touch, execute_sequentially
from vit_mechinterp.engine.backends import register_backend
from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.results.results import Results
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.ports import lookup
from vit_mechinterp.model.precedence import hook_output
from vit_mechinterp.model.visiting import replace_input, replace_output
from vit_mechinterp.spec import Site, TensorRef

__all__ = ["attend", "run_hooks"]


@register_backend("hooks")
def run_hooks(
    vit: HookedViT,
    bound: Bound,
    data: Data,
    tensors: Mapping[TensorRef, Tensor],
    *,
    batch_size: int,
    progress: bool,
) -> Results:
    """Carry out bound runs with plain hooks; see `execute_sequentially`."""
    return execute_sequentially(
        "hooks", (), _opened, _refusal, vit, bound, data, tensors, batch_size=batch_size, progress=progress
    )


def _refusal(vit: HookedViT, site: Site) -> str | None:
    if inside_attention(vit, site) and vit.layout.sequence is not None:
        return f"{site} is seen at the attention call, which serves all images as one sequence here"
    if site.name == "attn.result" and site.layer is not None and z_port(vit, site.layer) is None:
        return f"{site} follows from what enters the output projection, which is not the heads' output here"
    return None


@contextmanager
def _opened(vit: HookedViT, sites: Iterable[Site]) -> Iterator[Forward]:
    yield partial(_forward, vit)


def _forward(vit: HookedViT, images: Tensor, touches: Mapping[Site, Touch]) -> Tensor:
    """One forward with functions at sites; nothing stays on the module."""
    inside = {site: touch for site, touch in touches.items() if inside_attention(vit, site)}
    outside = {site: touch for site, touch in touches.items() if site not in inside}
    with ExitStack() as stack:
        for step in steps(vit, outside):
            _hook(stack, vit, step)
        by_layer: dict[int, dict[str, Touch]] = {}
        for site, touch in inside.items():
            assert site.layer is not None
            by_layer.setdefault(site.layer, {})[site.name.removeprefix("attn.")] = touch
        if by_layer:
            _patch_attention(stack, vit, by_layer)
        return vit(images)


def _hook(stack: ExitStack, vit: HookedViT, step: Step) -> None:
    module: nn.Module = lookup(vit.module, step.port.path)
    meant = _counting(stack, vit, step)
    if step.port.side == "input":

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return replace_input(step.port, args, kwargs, step.touch) if meant() else None

        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    else:

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            return replace_output(step.port, output, step.touch) if meant() else None

        stack.callback(hook_output(module, after, first=vit.layout.family.recorded).remove)


def _counting(stack: ExitStack, vit: HookedViT, step: Step) -> Callable[[], bool]:
    """Whether this call of a module, of several within its block, is the one that is meant."""
    if step.port.call is None:
        return lambda: True
    calls = [0]
    block: nn.Module = lookup(vit.module, step.port.scope)
    stack.callback(block.register_forward_pre_hook(lambda *_: calls.__setitem__(0, 0)).remove)

    def meant() -> bool:
        calls[0] += 1
        return calls[0] - 1 == step.port.call

    return meant


def _patch_attention(stack: ExitStack, vit: HookedViT, by_layer: Mapping[int, Mapping[str, Touch]]) -> None:
    """While a block's attention runs in this thread, let its attention call be `attend`."""
    native = F.scaled_dot_product_attention
    owner = threading.get_ident()
    current: list[Mapping[str, Touch]] = []

    def patched(*args: Any, **kwargs: Any) -> Tensor:
        if threading.get_ident() != owner or not current:
            return native(*args, **kwargs)
        return attend(current[-1], *args, **kwargs)

    for layer, touches in by_layer.items():
        attention: nn.Module = lookup(vit.module, vit.layout.attention_path(layer))
        enter = attention.register_forward_pre_hook(lambda *_, touches=touches: current.append(touches))
        leave = attention.register_forward_hook(lambda *_: current.clear(), always_call=True)
        stack.callback(enter.remove)
        stack.callback(leave.remove)
    stack.callback(setattr, F, "scaled_dot_product_attention", native)
    F.scaled_dot_product_attention = patched


def attend(
    touches: Mapping[str, Touch],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in four lines of arithmetic, ``[batch, head, token, d_head]``, with functions at q, k, v
    and z ``[batch, token, head, d_head]`` and at scores and pattern ``[batch, head, query, key]``."""

    def at(name: str, x: Tensor) -> Tensor:
        return touches[name](x) if name in touches else x

    def by_token(name: str, x: Tensor) -> Tensor:
        return at(name, x.transpose(1, 2)).transpose(1, 2)

    query, key, value = by_token("q", query), by_token("k", key), by_token("v", value)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, device=scores.device).triu(1)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
    scores = at("scores", scores)
    wide = torch.promote_types(scores.dtype, torch.float32)
    pattern = at("pattern", scores.softmax(dim=-1, dtype=wide).to(value.dtype))
    return by_token("z", pattern @ value)
