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

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.model.interception import Interception, PackedInterception, Visit
from vit_mechinterp.model.multihead import opened
from vit_mechinterp.model.packing import ENDS, Packing

__all__ = ["projected", "shadowed_forward", "tapped"]


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
def tapped(
    attention: nn.Module,
    visits: Mapping[str, Visit],
    where: str,
    n_heads: int = 1,
    packing: Packing | None = None,
) -> Iterator[None]:
    """Let ``visits`` see, and replace, the tensors inside one attention module's call.

    Taps on one module add up: a later one is given what the earlier ones returned.

    Args:
        attention: the module whose forward makes one attention call.
        visits: functions by site: ``q``, ``k``, ``v``, ``z`` are given ``[batch, token, head, d_head]``,
            ``scores`` and ``pattern`` ``[batch, head, query, key]``; each returns the tensor to go on with.
        where: the module's path, for messages.
        n_heads: number of heads, for a module that folds them into the batch.
        packing: how images lie in one sequence, for a module that attends to stretches of it one by one.

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
    tap = _Tap(opened(attention), visits, f"{where} ({type(attention).__name__})", n_heads, packing)
    with shadowed_forward(attention, tap):
        yield


class _Tap:
    """A forward whose one attention call is seen by every tap on the module, in the order of their coming."""

    def __init__(
        self,
        native: Callable[..., Any],
        visits: Mapping[str, Visit],
        where: str,
        n_heads: int,
        packing: Packing | None,
    ) -> None:
        self.native = native
        self.taps = [visits]
        self.where = where
        self.n_heads = n_heads
        self.packing = packing

    def _interception(self, kwargs: dict[str, Any]) -> Interception:
        if self.packing is None:
            return Interception(self.taps, self.n_heads)
        # Told of one stretch, the module makes one call; the interception makes a call for each stretch.
        ends: Tensor = kwargs[ENDS]
        kwargs[ENDS] = ends[[0, -1]]
        return PackedInterception(self.taps, self.n_heads, self.packing, ends)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._interception(kwargs) as interception:
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


def projected(kept: list[Tensor], out_projection: str, layer: int) -> Tensor:
    """What the output projection was given; it must have run where the attention increment is reached.

    Raises:
        ExecutionError: it has not.
    """
    if not kept:
        raise ExecutionError(
            f"out_projection={out_projection!r} has not run where attn_out of block {layer} is reached, so "
            "it is not the layer that mixes the heads back into the residual stream; declare that one."
        )
    return kept.pop()
