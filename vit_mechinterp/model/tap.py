"""The attention tap: read and edit q, k, v, scores, pattern and z where attention is computed.

timm and transformers call ``torch.nn.functional.scaled_dot_product_attention`` once per block. While a block
is tapped, its attention module's ``forward`` runs inside a `TorchFunctionMode` that intercepts that one call.
q, k, v and z pass through and the fused kernel still runs; scores and pattern exist only in explicit math,
which is done in the tapped block alone. Attention that is written out (eager attention, families without
fused attention) is a product, a softmax and a product; these are intercepted instead, and nothing is
recomputed. torch's own `nn.MultiheadAttention` is opened first (`vit_mechinterp.model.multihead`). The module
is shadowed on the instance and restored on exit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.model.multihead import opened

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
def tapped(attention: nn.Module, visits: Mapping[str, Visit], where: str, n_heads: int = 1) -> Iterator[None]:
    """Let ``visits`` see, and replace, the tensors inside one attention module's call.

    Taps on one module add up: a later one is given what the earlier ones returned.

    Args:
        attention: the module whose forward makes one attention call.
        visits: functions by site: ``q``, ``k``, ``v``, ``z`` are given ``[batch, token, head, d_head]``,
            ``scores`` and ``pattern`` ``[batch, head, query, key]``; each returns the tensor to go on with.
        where: the module's path, for messages.
        n_heads: number of heads, for a module that folds them into the batch.

    Raises:
        ExecutionError: during a forward, if the module did not make exactly one attention call.
    """
    there = vars(attention).get("forward")
    if isinstance(there, _Tap):
        there.taps.append(visits)
        try:
            yield
        finally:
            there.taps[:] = [tap for tap in there.taps if tap is not visits]
        return
    tap = _Tap(opened(attention), visits, f"{where} ({type(attention).__name__})", n_heads)
    with shadowed_forward(attention, tap):
        yield


class _Tap:
    """A forward whose one attention call is seen by every tap on the module, in the order of their coming."""

    def __init__(
        self, native: Callable[..., Any], visits: Mapping[str, Visit], where: str, n_heads: int
    ) -> None:
        self.native = native
        self.taps = [visits]
        self.where = where
        self.n_heads = n_heads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Interception(self.taps, self.n_heads) as interception:
            output = self.native(*args, **kwargs)
        if interception.calls != 1 or interception.is_open:
            raise ExecutionError(
                f"{self.where} made {interception.calls} attention calls where one was expected "
                "(scaled_dot_product_attention, or a product, a softmax and a product), so its attention "
                "cannot be read or edited; sites outside that call can. "
                + (_UNFUSED if interception.calls == 0 else "Its family's adapter should refuse this module.")
            )
        return output


_UNFUSED = (
    "Use fused attention: attn_implementation='sdpa' when loading with transformers (or "
    "model.set_attn_implementation('sdpa')); fused_attn=True on every attention module of timm."
)


_PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm})
_SOFTMAXES = frozenset({torch.softmax, Tensor.softmax, F.softmax})


class _Interception(TorchFunctionMode):
    def __init__(self, taps: Sequence[Mapping[str, Visit]], n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.visits: dict[str, list[Visit]] = {}
        for tap in taps:
            for site, visit in tap.items():
                self.visits.setdefault(site, []).append(visit)
        self.calls = 0
        self._keys: int | None = None
        self.is_open = False
        """Whether a softmax was seen whose product with the values has not come yet."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            if args and args[0].ndim == 3:
                return self._attend_folded(*args, **kwargs)
            return self._attend(*args, **kwargs)
        if func in _PRODUCTS and not kwargs and self._has_heads(args[0]) and args[0].ndim == args[1].ndim:
            return self._multiply(func, *args)
        if func in _SOFTMAXES and self._has_heads(args[0]) and args[0].shape[-1] == self._keys:
            return self._normalise(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _has_heads(self, x: Tensor) -> bool:
        """Whether a tensor is ``[batch, head, ., .]``, or with heads folded into the batch."""
        return x.ndim == 4 or (x.ndim == 3 and len(x) % self.n_heads == 0)

    def _multiply(self, func: Callable[..., Tensor], left: Tensor, right: Tensor) -> Tensor:
        """Queries by transposed keys, or the pattern by the values."""
        if self.is_open and left.shape[-1] == self._keys:
            self.is_open = False
            return self._by_token("z", func(left, self._by_token("v", right)))
        self._keys = right.shape[-1]
        query, key = self._by_token("q", left), self._by_token("k", right.transpose(-2, -1))
        return func(query, key.transpose(-2, -1))

    def _normalise(self, func: Callable[..., Tensor], scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        self.is_open = True
        return self._visit("pattern", func(self._visit("scores", scores), *args, **kwargs))

    def _attend_folded(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Heads folded into the batch, ``[batch * head, token, d_head]``."""
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = self._unfolded(attn_mask)
        query, key, value = map(self._unfolded, (query, key, value))
        return self._attend(query, key, value, attn_mask, *args, **kwargs).flatten(0, 1)

    def _unfolded(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.n_heads, *x.shape[1:])

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
        if site in self.visits and x.ndim == 3:
            return self._by_token(site, self._unfolded(x)).flatten(0, 1)
        return self._visit(site, x.transpose(1, 2)).transpose(1, 2) if site in self.visits else x

    def _visit(self, site: str, x: Tensor) -> Tensor:
        if site in self.visits and x.ndim == 3:
            return self._visit(site, self._unfolded(x)).flatten(0, 1)
        for visit in self.visits.get(site, ()):
            x = visit(x)
        return x

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
        scores = self._visit("scores", scores)
        # Softmax in float32 at least, as the fused kernels accumulate.
        precise = torch.promote_types(scores.dtype, torch.float32)
        pattern = self._visit("pattern", torch.softmax(scores, dim=-1, dtype=precise).to(value.dtype))
        if dropout_p > 0:
            pattern = F.dropout(pattern, dropout_p)
        return pattern @ value
