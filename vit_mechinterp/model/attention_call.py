"""One call of fused attention: its arguments, and what it computes, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["AttentionCall", "softmax_over_keys"]


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call of torch's ``scaled_dot_product_attention``, in its order and by its names.

    Args:
        query, key, value: ``[batch, head, token, d_head]``, or ``[batch * head, token, d_head]``.
        attn_mask: what scores are masked with, or None.
        dropout_p: the probability of dropout.
        is_causal: whether tokens attend to those before them alone.
        scale: what scores are multiplied by; one over the square root of ``d_head`` by default.
        enable_gqa: whether several heads of queries share one of keys and values.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        return self.query, self.key, self.value

    def with_parts(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
        """The same call of other queries, keys and values."""
        return replace(self, query=query, key=key, value=value)

    def unfolded(self, unfold: Callable[[Tensor], Tensor]) -> AttentionCall:
        """The call with heads on an axis of their own, for one that has them folded into the batch."""
        call = self.with_parts(*map(unfold, self.parts))
        if self.attn_mask is None or self.attn_mask.ndim != 3:
            return call
        return replace(call, attn_mask=unfold(self.attn_mask))

    def fused(self) -> Float[Tensor, "*batch token d_head"]:
        """What torch makes of it."""
        # Grouping is passed on only where it is on: older signatures lack the argument.
        extra: dict[str, Any] = {"enable_gqa": True} if self.enable_gqa else {}
        return F.scaled_dot_product_attention(
            *self.parts,
            attn_mask=self.attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            **extra,
        )

    def scores(self) -> Float[Tensor, "batch head query key"]:
        """Scores, scaled and masked."""
        scores = _scaled_product(self.query, self._for_every_query_head(self.key), self._factor)
        if self.is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -math.inf)
        if self.attn_mask is None:
            return scores
        is_bool = self.attn_mask.dtype == torch.bool
        return scores.masked_fill(~self.attn_mask, -math.inf) if is_bool else scores + self.attn_mask

    def mixed(self, pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query d"]:
        """Values mixed by a pattern, behind dropout."""
        if self.dropout_p > 0:
            pattern = F.dropout(pattern, self.dropout_p)
        return pattern @ self._for_every_query_head(self.value)

    @property
    def _factor(self) -> float:
        return 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale

    def _for_every_query_head(self, x: Tensor) -> Tensor:
        if not self.enable_gqa:
            return x
        return x.repeat_interleave(self.query.shape[1] // x.shape[1], dim=1)


def _scaled_product(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Every query by every key, scaled by the product itself: a pass over all scores is slow."""
    leading = query.shape[:-2]
    q, k = (x.expand(*leading, *x.shape[-2:]).flatten(0, -3) for x in (query, key))
    product = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    return product.reshape(*leading, *product.shape[-2:])


def softmax_over_keys(scores: Tensor, *, own: bool) -> Tensor:
    """Softmax over keys, in float32 at least, as the fused kernels accumulate.

    It is written over scores that are the caller's ``own``, and that no gradient needs: to fill memory that
    is new takes as long as the softmax.
    """
    precise = torch.promote_types(scores.dtype, torch.float32)
    if own and scores.dtype == precise and not torch.is_grad_enabled():
        # Refused, before anything is written, inside vmap and forward-mode differentiation.
        with suppress(RuntimeError):
            return torch.softmax(scores, dim=-1, out=scores)
    return torch.softmax(scores, dim=-1, dtype=precise)
