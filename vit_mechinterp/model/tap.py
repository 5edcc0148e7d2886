"""The attention tap: read and edit q, k, v, scores, pattern and z where attention is computed.

timm and transformers call ``torch.nn.functional.scaled_dot_product_attention`` once per block. While a block
is tapped, its attention module's ``forward`` runs inside a `TorchFunctionMode` that intercepts that one call.
q, k, v and z pass through and the fused kernel still runs; scores and pattern exist only in explicit math,
which is done in the tapped block alone. The module is shadowed on the instance and restored on exit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vit_mechinterp.errors import ExecutionError

__all__ = ["shadowed_forward", "tapped"]

Visit = Callable[[Tensor], Tensor]


@contextmanager
def shadowed_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace ``module.forward`` on the instance, and put back exactly what was there."""
    own = vars(module)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            own.pop("forward", None)
        else:
            own["forward"] = before


@contextmanager
def tapped(attention: nn.Module, visits: Mapping[str, Visit], where: str) -> Iterator[None]:
    """Let ``visits`` see, and replace, the tensors inside one attention module's call.

    Args:
        attention: the module whose forward makes one attention call.
        visits: functions by site: ``q``, ``k``, ``v``, ``z`` are given ``[batch, token, head, d_head]``,
            ``scores`` and ``pattern`` ``[batch, head, query, key]``; each returns the tensor to go on with.
        where: the module's path, for messages.

    Raises:
        ExecutionError: during a forward, if the module did not make exactly one attention call.
    """
    native = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Interception(visits) as interception:
            output = native(*args, **kwargs)
        if interception.calls != 1:
            raise ExecutionError(
                f"{where} ({type(attention).__name__}) made {interception.calls} calls of "
                "scaled_dot_product_attention where one was expected, so its attention cannot be read or "
                "edited. "
                "Load the model with fused attention (transformers: attn_implementation='sdpa'; timm: "
                "fused_attn)."
            )
        return output

    with shadowed_forward(attention, forward):
        yield


class _Interception(TorchFunctionMode):
    def __init__(self, visits: Mapping[str, Visit]) -> None:
        super().__init__()
        self.visits = visits
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        query, key, value = (self._by_token(site, x) for site, x in (("q", query), ("k", key), ("v", value)))
        if "scores" in self.visits or "pattern" in self.visits:
            z = self._explicit(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        else:
            # GQA is passed on only where it is on: older signatures lack the argument.
            extra = {"enable_gqa": True} if enable_gqa else {}
            z = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                **extra,
            )
        return self._by_token("z", z)

    def _by_token(self, site: str, x: Tensor) -> Tensor:
        """Visit ``[batch, head, token, d_head]`` as ``[batch, token, head, d_head]``."""
        visit = self.visits.get(site)
        return x if visit is None else visit(x.transpose(1, 2)).transpose(1, 2)

    def _explicit(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        grouped: bool,
    ) -> Tensor:
        if grouped:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        if "scores" in self.visits:
            scores = self.visits["scores"](scores)
        # Softmax in float32, as the fused kernels accumulate.
        pattern = torch.softmax(scores.float(), dim=-1).to(value.dtype)
        if "pattern" in self.visits:
            pattern = self.visits["pattern"](pattern)
        if dropout_p > 0:
            pattern = F.dropout(pattern, dropout_p)
        return pattern @ value
