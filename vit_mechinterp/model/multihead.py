"""torch's `nn.MultiheadAttention`, with an inside that can be seen.

Its own forward is closed: in eval mode and without gradients one kernel leads from the input to the output,
otherwise ``F.multi_head_attention_forward`` hides the attention call that it makes from an interception. Both
read the weight of ``out_proj`` without calling it. While such a module is tapped it is computed here, by the
same arithmetic as separate calls: the input projection, attention, and the output projection's own forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_mechinterp.errors import ExecutionError

__all__ = ["is_closed", "opened"]


def is_closed(attention: nn.Module) -> bool:
    """Whether a module computes attention as `nn.MultiheadAttention` does, so that a tap must open it."""
    return type(attention).forward is nn.MultiheadAttention.forward


def opened(attention: nn.Module) -> Callable[..., Any]:
    """The module's forward, with an attention call and an output projection that can be seen.

    It differs from the kernel without gradients by rounding, and from the forward with gradients not at all.
    """
    if not is_closed(attention) or "forward" in vars(attention):
        return attention.forward
    return partial(_forward, attention)


def _forward(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # a hint about the mask, which is applied either way
) -> tuple[Tensor, Tensor | None]:
    if query.ndim != 3 or attention.in_proj_weight is None or attention.bias_k is not None:
        raise ExecutionError(
            f"The inside of {type(attention).__name__} can be seen where batches of tokens come in, of the "
            "width of its output, and nothing is added to the keys (bias_k, add_bias_kv)."
        )
    alike = query is key and key is value
    if attention.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    n_heads = attention.num_heads
    if alike:
        projected = F.linear(query, attention.in_proj_weight, attention.in_proj_bias)
        width = projected.shape[-1] // 3
        q, k, v = projected.reshape(*projected.shape[:-1], 3, width).movedim(-2, 0).contiguous()
    else:
        weights = attention.in_proj_weight.chunk(3)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    # [token, batch, channel] to [batch, head, token, d_head]
    q, k, v = (x.unflatten(-1, (n_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
    if attention.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    mask = _merged(attn_mask, key_padding_mask, q, k)
    dropout = attention.dropout if attention.training else 0.0
    pattern: Tensor | None = None
    if need_weights:
        scores = torch.matmul(q, k.transpose(-2, -1)).mul_(1 / math.sqrt(q.shape[-1]))
        pattern = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        z = torch.matmul(F.dropout(pattern, dropout) if dropout else pattern, v)
        pattern = pattern.mean(dim=1) if average_attn_weights else pattern
    else:
        z = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    output = attention.out_proj(z.permute(2, 0, 1, 3).flatten(2))
    return output.transpose(0, 1) if attention.batch_first else output, pattern


def _merged(mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores: the mask of queries and keys, with the mask of keys that only pad."""
    merged: Tensor | None = None
    if mask is not None:
        merged = _added(mask, q)
        merged = merged.reshape(*q.shape[:2], *mask.shape[-2:]) if mask.ndim == 3 else merged[None, None]
    if padding is not None:
        pads = _added(padding, q)[:, None, None]
        merged = pads if merged is None else merged + pads
    # A key that add_zero_attn puts behind the others is seen by all queries.
    return merged if merged is None else F.pad(merged, (0, k.shape[2] - merged.shape[-1]))


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as it is added to scores; torch's modules mark with True what must not be seen."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
