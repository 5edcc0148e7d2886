"""The last block, narrowed behind its attention to the tokens that somebody reads.

Tokens reach each other in attention alone: behind the last attention call a token that the output does not
read, and nobody else either, is work for nothing. The call is given the queries of the tokens that are read,
and every module behind it these tokens alone; all others are zeros from there on. Modules are shadowed on the
instance for the duration of a ``with`` block, and hooks on them see the whole token axis.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vit_mechinterp.model.layout import Layout
from vit_mechinterp.model.ports import lookup
from vit_mechinterp.model.tap import shadowed_forward

__all__ = ["Narrowing", "forget", "mixes_tokens"]

logger = logging.getLogger(__name__)

_TOKENWISE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that gave some tokens the same values, alone and among all."""
_MIXING: weakref.WeakSet[nn.Module] = weakref.WeakSet()

_FREE = (nn.Identity, nn.Dropout)
"""Modules that cost nothing in eval mode."""


def forget(block: nn.Module) -> None:
    """Let the parts of a block be compared anew: they may run another function than they did."""
    for part in block.modules():
        _TOKENWISE.discard(part)
        _MIXING.discard(part)


def mixes_tokens(block: nn.Module) -> bool:
    """Whether a part of a block was seen to give a token other values alone than among all."""
    return any(part in _MIXING for part in block.modules())


class Narrowing:
    """The last block of one native module, narrowed to some tokens while `installed`.

    Args:
        module: the native module.
        layout: what is where in it.
        tokens: positions that are read behind the attention call, ascending.
        opened: narrow the smallest modules, as if something looked into all others.

    Attributes:
        called: whether the attention call ran on fewer tokens.
        narrowed: modules that did.
    """

    def __init__(
        self, module: nn.Module, layout: Layout, tokens: Sequence[int], *, opened: bool = False
    ) -> None:
        self.block: nn.Module = lookup(module, layout.block_path(layout.n_layers - 1))
        self.attention: nn.Module = lookup(module, layout.attention_path(layout.n_layers - 1))
        self.tokens = list(tokens)
        self.opened = opened
        self.n_tokens = layout.tokens.n_tokens
        self.behind = False
        self.called = False
        self.narrowed: set[nn.Module] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Shadow the block's parts; to be entered behind whatever else is installed on them."""
        with ExitStack() as stack:
            stack.callback(self.block.register_forward_pre_hook(self._begin).remove)
            for part in self._parts(self.block):
                stack.enter_context(shadowed_forward(part, _Narrowed(part, self)))
            attend = _AttentionModule(self.attention.forward, self)
            stack.enter_context(shadowed_forward(self.attention, attend))
            yield

    def narrow(self, x: Tensor, axis: int = 1) -> Tensor:
        """The tokens that are read."""
        if self._follow:
            return x.narrow(axis, self.tokens[0], len(self.tokens))
        return x.index_select(axis, torch.as_tensor(self.tokens, device=x.device))

    def widen(self, x: Tensor) -> Tensor:
        """All tokens, ``[batch, token, ...]``, those that are not read as zeros."""
        if self._follow:
            behind = self.n_tokens - self.tokens[-1] - 1
            return F.pad(x, [*[0, 0] * (x.ndim - 2), self.tokens[0], behind])
        every = x.new_zeros(len(x), self.n_tokens, *x.shape[2:])
        return every.index_copy(1, torch.as_tensor(self.tokens, device=x.device), x)

    @property
    def _follow(self) -> bool:
        """Whether the tokens follow one another, as a prefix does, so that nothing need be gathered."""
        return self.tokens[-1] - self.tokens[0] == len(self.tokens) - 1

    def _begin(self, block: nn.Module, args: Any) -> None:
        self.behind = False

    def _parts(self, module: nn.Module) -> Iterator[nn.Module]:
        """The largest modules that nothing looks into, without those that hold the attention call. Lists of
        modules have no forward, and their members are left whole."""
        for child in module.children():
            holds_call = any(part is self.attention for part in child.modules())
            inside = any(True for _ in child.children())
            if holds_call or (inside and (self.opened or _is_opened(child))):
                yield from self._parts(child)
            elif not isinstance(child, (*_FREE, nn.ModuleList, nn.ModuleDict)):
                yield child


def _is_opened(module: nn.Module) -> bool:
    """Whether a part of a module is hooked or shadowed."""
    inside = (part for part in module.modules() if part is not module)
    return any(p._forward_hooks or p._forward_pre_hooks or "forward" in vars(p) for p in inside)


class _Narrowed:
    """The forward of a module: behind the attention call it runs on the tokens that are read."""

    def __init__(self, module: nn.Module, narrowing: Narrowing) -> None:
        self.module = module
        self.native = module.forward
        self.narrowing = narrowing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.narrowing
        if not own.behind or self.module in _MIXING or not self._by_token(args, kwargs):
            return self.native(*args, **kwargs)
        few = tuple(map(self._few, args)), {name: self._few(value) for name, value in kwargs.items()}
        if self.module not in _TOKENWISE:
            return self._tried(args, kwargs, *few)
        own.narrowed.add(self.module)
        return self._every(self.native(*few[0], **few[1]))

    def _tried(self, args: Any, kwargs: Any, few_args: Any, few_kwargs: Any) -> Any:
        """The whole output, and once per module a comparison: tokens alone must get what they get here."""
        output = self.native(*args, **kwargs)
        whole, alone = _tensors(output), []
        try:
            with torch.no_grad():
                alone = _tensors(self.native(*few_args, **few_kwargs))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a module makes of a token axis that it was not made for
            logger.debug("%s takes no tokens alone: %s", type(self.module).__name__, error)
        fits = bool(whole) and len(whole) == len(alone) and all(map(self._agree, whole, alone))
        (_TOKENWISE if fits else _MIXING).add(self.module)
        return output

    def _agree(self, whole: Tensor, alone: Tensor) -> bool:
        if whole.ndim < 3 or whole.shape[1] != self.narrowing.n_tokens:
            return False
        expected = self.narrowing.narrow(whole.detach())
        if expected.shape != alone.shape:
            return False
        tolerance = 1e-4 if whole.dtype in (torch.float32, torch.float64) else 3e-2
        return bool((expected - alone).abs().max() <= tolerance * expected.abs().max())

    def _by_token(self, args: Any, kwargs: Any) -> bool:
        """Whether tokens are the second axis of the input, and no other tensor belongs to the rows."""
        tensors = _tensors((*args, *kwargs.values()))
        if not tensors:
            return False
        given = tensors[0]
        return self._has_tokens(given) and all(
            self._has_tokens(x) or x.ndim == 0 or len(x) != len(given) for x in tensors[1:]
        )

    def _has_tokens(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim == 3 and x.shape[1] == self.narrowing.n_tokens

    def _few(self, value: Any) -> Any:
        return self.narrowing.narrow(value) if self._has_tokens(value) else value

    def _every(self, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(map(self._every, output))
        return self.narrowing.widen(output) if isinstance(output, Tensor) else output


def _tensors(values: Any) -> list[Tensor]:
    """The tensors of an output, or of arguments."""
    return [x for x in (values if isinstance(values, tuple) else (values,)) if isinstance(x, Tensor)]


class _AttentionModule:
    """The forward of the attention module; behind its call, or behind itself, tokens are for themselves."""

    def __init__(self, native: Callable[..., Any], narrowing: Narrowing) -> None:
        self.native = native
        self.narrowing = narrowing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _AttentionCall(self.narrowing):
            output = self.native(*args, **kwargs)
        self.narrowing.behind = True
        return output


class _AttentionCall(TorchFunctionMode):
    """The one attention call, on the queries of the tokens that are read."""

    def __init__(self, narrowing: Narrowing) -> None:
        super().__init__()
        self.narrowing = narrowing

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention or self.narrowing.behind or len(args) < 3:
            return func(*args, **kwargs)
        options = dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False)) | kwargs
        query, mask = args[0], options.get("attn_mask")
        if query.ndim != 4 or query.shape[2] != self.narrowing.n_tokens or options.get("is_causal"):
            return func(*args, **kwargs)
        narrow = self.narrowing.narrow
        if mask is not None and mask.ndim > 1 and mask.shape[-2] == query.shape[2]:
            options["attn_mask"] = narrow(mask, -2)
        few = func(narrow(query, 2), *args[1:3], **options)
        self.narrowing.behind = self.narrowing.called = True
        return self.narrowing.widen(few.transpose(1, 2)).transpose(1, 2)
