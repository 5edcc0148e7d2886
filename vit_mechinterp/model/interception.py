"""One attention call, caught in the act: q, k, v, scores, pattern and z pass by visitors on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vit_mechinterp.model.attention_call import AttentionCall, softmax_over_keys
from vit_mechinterp.model.packing import Packing
from vit_mechinterp.model.visiting import laid_out_as

__all__ = ["Interception", "PackedInterception", "Visit", "among_visitors"]

Visit = Callable[[Tensor], Tensor]

_PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm})
_SCALINGS = frozenset({torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})
_SOFTMAXES = frozenset({torch.softmax, Tensor.softmax, F.softmax})

_VISITING: ContextVar[bool] = ContextVar("visiting", default=False)


@contextmanager
def among_visitors() -> Iterator[None]:
    """While visitors are at work: what they compute is none of the model's attention."""
    before = _VISITING.set(True)
    try:
        yield
    finally:
        _VISITING.reset(before)


class Interception(TorchFunctionMode):
    """One call of a module that attends, as a mode in which it runs.

    Args:
        taps: visitors by site; each is given what the one before it returned.
        n_heads: number of heads, for a module that folds them into the batch.

    Attributes:
        calls: attention calls that were made.
    """

    def __init__(self, taps: Sequence[Mapping[str, Visit]], n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.visits: dict[str, list[Visit]] = {}
        for tap in taps:
            for site, visit in tap.items():
                self.visits.setdefault(site, []).append(visit)
        self.calls = 0
        self._keys: int | None = None
        self._scaled: tuple[Tensor, Tensor, float] | None = None
        """The last tensor that a number multiplied, what it was before, and the number."""
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
        if _VISITING.get():
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return self._attend(AttentionCall(*args, **kwargs))
        return self._unfused(func, args, kwargs)

    def _unfused(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any other function: attention that is written out is seen at its products and its softmax."""
        if func in _PRODUCTS and not kwargs and self._has_heads(args[0]) and args[0].ndim == args[1].ndim:
            return self._multiply(func, *args)
        if func in _SOFTMAXES and self._has_heads(args[0]) and args[0].shape[-1] == self._keys:
            return self._normalise(func, *args, **kwargs)
        if func in _SCALINGS and "q" in self.visits and not kwargs and isinstance(args[1], (float, int)):
            output = func(*args)
            self._scaled = output, args[0], args[1]
            return output
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
        query, key = self._queries(left), self._by_token("k", right.transpose(-2, -1))
        return func(query, key.transpose(-2, -1))

    def _queries(self, left: Tensor) -> Tensor:
        """Queries as fused attention is given them: before the scale, where that multiplies them first."""
        if self._scaled is None or left is not self._scaled[0]:
            return self._by_token("q", left)
        _, unscaled, scale = self._scaled
        return self._by_token("q", unscaled) * scale

    def _normalise(self, func: Callable[..., Tensor], scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        self.is_open = True
        return self._visit("pattern", func(self._visit("scores", scores), *args, **kwargs))

    def _unfolded(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.n_heads, *x.shape[1:])

    def _attend(self, call: AttentionCall) -> Tensor:
        """What a call of fused attention gives, seen and changed by visitors on its way."""
        if call.query.ndim == 3:
            return self._attend(call.unfolded(self._unfolded)).flatten(0, 1)
        visited = (self._by_token(site, x) for site, x in zip("qkv", call.parts, strict=True))
        return self._by_token("z", self._mixed(call.with_parts(*visited)))

    def _mixed(self, call: AttentionCall) -> Tensor:
        """What comes out of a call, for what goes into it."""
        return self._explicit(call) if self._opens else call.fused()

    @property
    def _opens(self) -> bool:
        """Whether somebody looks at what the fused kernel does not put out."""
        return "scores" in self.visits or "pattern" in self.visits

    def _explicit(self, call: AttentionCall) -> Tensor:
        """The call, step by step."""
        scores = self._visit("scores", call.scores())
        normalised = softmax_over_keys(scores, own="scores" not in self.visits)
        pattern = self._visit("pattern", normalised.to(call.value.dtype))
        return call.mixed(pattern)

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


class PackedInterception(Interception):
    """The call of a module whose images lie in one sequence, ``[1, head, image * token, d_head]``.

    Visitors see images as rows, with tokens in the layout's order. The fused kernel is called for every
    stretch by itself, as the module does; explicit attention is masked to the stretches.
    """

    def __init__(
        self, taps: Sequence[Mapping[str, Visit]], n_heads: int, packing: Packing, ends: Tensor
    ) -> None:
        super().__init__(taps, n_heads)
        self.packing = packing
        self.ends = ends

    def _unfused(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _by_token(self, site: str, x: Tensor) -> Tensor:
        if site not in self.visits:
            return x
        seen = self._rows(x)
        new = self._visit(site, seen)
        return x if new is seen and not x.requires_grad else laid_out_as(x, self._sequence(new))

    def _rows(self, x: Tensor) -> Tensor:
        """Turn ``[1, head, image * token, d_head]`` into ``[image, token, head, d_head]``."""
        return self.packing.unpack(x[0].transpose(0, 1))

    def _sequence(self, rows: Tensor) -> Tensor:
        return self.packing.pack(rows).transpose(0, 1)[None]

    def _mixed(self, call: AttentionCall) -> Tensor:
        if self._opens:
            by_image = call.with_parts(*(self._rows(x).transpose(1, 2) for x in call.parts))
            z = self._explicit(replace(by_image, attn_mask=self._allowed()))
            return self._sequence(z.transpose(1, 2))
        sizes = self.ends.diff().tolist()
        parts = zip(*(torch.split(x, sizes, dim=2) for x in call.parts), strict=True)
        return torch.cat([call.with_parts(*own).fused() for own in parts], dim=2)

    def _allowed(self) -> Tensor | None:
        """Which tokens of an image attend to which, ``[query, key]``; None where all attend to all."""
        ends = self.packing.stretches(self.ends)
        if len(ends) == 2:
            return None
        sizes = torch.tensor(ends, device=self.ends.device).diff()
        number = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        stretch = self.packing.unpack(number)[0]
        return stretch[:, None] == stretch
