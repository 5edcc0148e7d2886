"""Parts of a block that run once for several rows, where these rows still hold the same values.

Rows of one example that join a batch at one block are equal until the first of them is edited. Every part of
the block that ends before is given the distinct rows alone, and what it puts out is handed to all of them. So
it is, whatever it is, to rows that are given known values behind it.
Norms, linear layers and the activation function are row-wise by nature, the attention call and the attention
module by construction; each is shadowed on the instance for one forward, and hooks on it see all rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vit_mechinterp.model.layout import Layout
from vit_mechinterp.model.ports import Port, lookup
from vit_mechinterp.model.tap import shadowed_forward

__all__ = ["PARTS", "Distinct", "Sparing", "costs_of", "share_of", "why_nothing_is_spared"]

PARTS = ("ln1", "attn.q", "attn.z", "attn.result", "attn_out", "ln2", "mlp.pre", "mlp.post")
"""Parts by the first site behind them: the norm, the projections to q, k and v, the attention call, the
output projection, the whole attention module, the second norm, the first layer of the MLP, its activation
function. Rows whose first edit is at the site or behind it are still equal there."""

ACTIVATIONS = ("act", "activation_fn", "act_fn", "intermediate_act_fn", "activation")
PLAIN = (type(None), bool, int, float, str, torch.dtype)

_UNFIT: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that saw other values where they should have seen equal ones."""
_FIT: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_LEFT_ALONE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules whose output nobody wrote into, so that all rows of it may be one and the same."""


@dataclass(frozen=True)
class Distinct:
    """The rows of a batch that differ, ``first [d]``, and for every row its place among them, ``index``.

    ``free`` marks rows for which any place will do, because what is made of them here is written over.
    """

    first: NDArray[np.int64]
    index: NDArray[np.int64]
    free: NDArray[np.bool_]


def why_nothing_is_spared(layout: Layout) -> str | None:
    """Why parts of this model's blocks cannot run for some of the rows alone, or None if they can."""
    family = layout.family
    if family.parallel or not family.attention:
        return f"blocks of {family.name} run attention and MLP in one"
    if layout.packing is not None:
        return f"{family.name} packs all rows into one sequence"
    return None


def parts_of(module: nn.Module, layout: Layout, layer: int) -> dict[str, list[nn.Module]]:
    """Modules of a block by the part that they are; the attention call has none."""
    parts: dict[str, list[nn.Module]] = {part: [] for part in PARTS}
    for part, site in (("ln1", "ln1"), ("ln2", "ln2"), ("mlp.pre", "mlp.pre"), ("mlp.pre", "mlp.pre_linear")):
        port = layout.ports.get(f"blocks.{layer}.{site}")
        if isinstance(port, Port) and port.side == "output" and port.call is None and port.field is None:
            found: nn.Module = lookup(module, port.path)
            if all(found is not other for other in parts[part]):
                parts[part].append(found)
            if part == "mlp.pre":
                mlp: nn.Module = lookup(module, port.path.rpartition(".")[0])
                names = [name for name in ACTIVATIONS if name in dict(mlp.named_children())]
                parts["mlp.post"] = [getattr(mlp, name) for name in names]
    attention: nn.Module = lookup(module, layout.attention_path(layer))
    projection: nn.Module = lookup(lookup(module, layout.block_path(layer)), layout.family.out_projection)
    linear = (child for child in attention.children() if isinstance(child, nn.Linear))
    parts["attn.q"] = [child for child in linear if child is not projection]
    parts["attn.result"] = [projection]
    parts["attn_out"] = [attention]
    return parts


def costs_of(module: nn.Module, layout: Layout, layer: int) -> dict[str, float]:
    """Share of a block's multiplications that each part makes, for one row; the whole attention module's
    share is that of its parts."""
    parts = parts_of(module, layout, layer)
    shares = {part: share_of(module, layout, layer, own) for part, own in parts.items()}
    return shares | {"attn.z": share_of(module, layout, layer, (), call=True), "attn_out": 0.0}


def share_of(
    module: nn.Module, layout: Layout, layer: int, parts: Iterable[nn.Module], *, call: bool = False
) -> float:
    """Share of a block's multiplications that some of its modules make, and its attention call if asked."""
    block: nn.Module = lookup(module, layout.block_path(layer))
    of_call = 2 * layout.tokens.n_tokens * layout.n_heads * layout.d_head
    return (_multiplications(parts) + call * of_call) / (_multiplications([block]) + of_call)


def _multiplications(modules: Iterable[nn.Module]) -> int:
    """By one token, in layers with a matrix of weights."""
    weights = {id(w): w for m in modules for w in m.parameters() if w.ndim == 2}
    return sum(w.numel() for w in weights.values())


class Sparing:
    """What is spared in one forward of a native module, in place for the duration of `installed`."""

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self.module = module
        self.layout = layout
        self._wanted: dict[int, Mapping[str, Distinct]] = {}
        self._opened: set[int] = set()
        self._watched: list[tuple[nn.Module, Tensor, int]] = []

    def spare(self, layer: int, distinct: Mapping[str, Distinct], *, opened: bool) -> None:
        """Let parts of a block run on distinct rows alone.

        Args:
            layer: the block.
            distinct: the distinct rows by part.
            opened: whether anything inside the attention module is read or edited there, by any row.
        """
        self._wanted[layer] = distinct
        if opened:
            self._opened.add(layer)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Shadow the parts; to be entered behind an instrument's, so that taps lie inside."""
        with ExitStack() as stack:
            for layer, distinct in self._wanted.items():
                self._install(stack, layer, distinct)
            yield
            _LEFT_ALONE.update(module for module, x, version in self._watched if x._version == version)
            self._watched.clear()

    def _install(self, stack: ExitStack, layer: int, distinct: Mapping[str, Distinct]) -> None:
        parts = parts_of(self.module, self.layout, layer)
        attention = parts["attn_out"][0]
        inside = [m for m in attention.modules() if m is not attention]
        watched = any(m._forward_hooks or m._forward_pre_hooks for m in inside)
        whole = "attn_out" in distinct and layer not in self._opened and not watched
        entering: list[Tensor] = []
        for part, rows in distinct.items():
            if part == "attn_out" or (whole and part in ("attn.q", "attn.z", "attn.result")):
                continue
            for module in parts[part]:
                spared = _Spared(module, rows, self._watched, entering if part == "attn.q" else None)
                stack.enter_context(shadowed_forward(module, spared))
        if whole:
            spared = _Spared(attention, distinct["attn_out"], self._watched)
            stack.enter_context(shadowed_forward(attention, spared))
        elif "attn.q" in distinct:
            attend = _Attending(attention.forward, distinct.get("attn.z"), entering)
            stack.enter_context(shadowed_forward(attention, attend))


class _Spared:
    """The forward of a part: it runs on the distinct rows, at its first call in the forward.

    ``entering`` holds what entered the attention module: a projection to q, k or v is one that reads it as it
    is. Linear layers that read scores (talking heads) or z (gates) come behind edits.
    """

    def __init__(
        self,
        module: nn.Module,
        rows: Distinct,
        watched: list[tuple[nn.Module, Tensor, int]],
        entering: list[Tensor] | None = None,
    ) -> None:
        self.module = module
        self.native = module.forward
        self.rows = rows
        self.watched = watched
        self.entering = entering
        self.called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()), None)
        again, self.called = self.called, True
        if again or not isinstance(given, Tensor) or self.module in _UNFIT:
            return self.native(*args, **kwargs)
        if self.entering is not None and not any(_is_same(given, x) for x in self.entering):
            return self.native(*args, **kwargs)
        if not self._one_for_all(given, args, kwargs):
            return self.native(*args, **kwargs)
        few = _rows(given, self.rows.first)
        if self.module not in _FIT and not self.rows.free.all():
            # Once per module: whatever its place in the block, it must see equal values.
            those = np.flatnonzero(~self.rows.free)
            wanted = _rows(given, those).detach()
            off = float((_rows(few.detach(), self.rows.index[those]) - wanted).abs().max())
            (_FIT if off <= 1e-4 * float(wanted.abs().max()) else _UNFIT).add(self.module)
            if self.module in _UNFIT:
                return self.native(*args, **kwargs)
        args = tuple(few if value is given else value for value in args)
        kwargs = {name: few if value is given else value for name, value in kwargs.items()}
        return self._expanded(self.native(*args, **kwargs))

    def _one_for_all(self, given: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the batch is in the first argument alone, row by row."""
        if given.ndim < 2 or len(given) != len(self.rows.index):
            return False
        return all(_is_free(value, given) for value in (*args, *kwargs.values()))

    def _expanded(self, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(map(self._expanded, output))
        if not (isinstance(output, Tensor) and output.ndim and len(output) == len(self.rows.first)):
            return output
        if len(output) == 1 and self.module in _LEFT_ALONE:
            return output.expand(len(self.rows.index), *output.shape[1:])
        rows = _rows(output, self.rows.index)
        if self.module not in _LEFT_ALONE and not rows.is_inference():
            self.watched.append((self.module, rows, rows._version))
        return rows


def _is_free(value: Any, given: Tensor) -> bool:
    """Whether an argument holds no rows beside those that are given."""
    if isinstance(value, (tuple, list)):
        return all(_is_free(own, given) for own in value)
    if isinstance(value, Tensor):
        return value is given or value.ndim == 0 or len(value) % len(given) != 0
    return isinstance(value, PLAIN)


def _is_same(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one piece of memory, in whatever shape."""
    return x is other or (x.data_ptr() == other.data_ptr() and x.shape.numel() == other.shape.numel())


class _Attending:
    """The forward of an attention module: notes what enters, and lets its one attention call run on the
    distinct rows, if any are given."""

    def __init__(self, native: Callable[..., Any], rows: Distinct | None, entering: list[Tensor]) -> None:
        self.native = native
        self.rows = rows
        self.entering = entering

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.entering[:] = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)][:1]
        try:
            with nullcontext() if self.rows is None else _Call(self.rows):
                return self.native(*args, **kwargs)
        finally:
            self.entering.clear()


class _Call(TorchFunctionMode):
    def __init__(self, rows: Distinct) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or len(args) < 3:
            return func(*args, **kwargs)
        n = len(self.rows.index)
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        # A mask of fewer axes, or of one row, is the same for all rows.
        masked = mask is not None and mask.ndim == 4 and len(mask) != 1
        if masked or any(x.ndim != 4 or len(x) != n for x in args[:3]):
            return func(*args, **kwargs)
        few = (_rows(x, self.rows.first) for x in args[:3])
        return _rows(func(*few, *args[3:], **kwargs), self.rows.index)


def _rows(x: Tensor, rows: NDArray[np.int64]) -> Tensor:
    if len(rows) == len(x) and bool((rows == np.arange(len(x))).all()):
        return x
    return x.index_select(0, torch.as_tensor(rows, device=x.device))
