"""Visits: functions that see, and may replace, the tensors at named sites during native forwards.

`Instrument` is the one piece that touches a native module: it turns visits into the fewest hooks and taps,
installs them for the duration of a ``with`` block, counts that each fired, and leaves nothing behind.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vit_mechinterp.errors import ExecutionError, UnsupportedSiteError
from vit_mechinterp.model.checkpointing import refuse_checkpointing
from vit_mechinterp.model.head_weights import head_weights
from vit_mechinterp.model.interception import among_visitors
from vit_mechinterp.model.layout import TAP_SITES, Layout
from vit_mechinterp.model.multihead import is_closed
from vit_mechinterp.model.ports import Difference, Port, Share, is_missing, lookup
from vit_mechinterp.model.precedence import hook_output
from vit_mechinterp.model.tap import projected, shadowed_forward, tapped
from vit_mechinterp.model.visiting import contribution, hand_on, hand_on_tuple, replace_input, replace_output
from vit_mechinterp.spec import Site

__all__ = ["Instrument", "StopForward", "Visitor"]

Visitor = Callable[[Tensor], Tensor | None]
"""Given the tensor at a site; returns its replacement, or None to leave it as it is."""


# Per-head results that an instrument edited, by output projection, until their block ends: what an instrument
# installed later on the same module reads.
_EDITED_RESULTS: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


class StopForward(BaseException):
    """Raised inside a native forward, and caught outside it, once nothing further down is wanted.

    A BaseException, so that no ``except Exception`` of the model's own swallows it.
    """


class Instrument:
    """Visits to sites of one native module, in place for the duration of `installed`.

    Visits at one site run in the order in which they were added; each sees what the one before it returned.
    """

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self.module = module
        self.layout = layout
        self._visits: dict[Site, list[Visitor]] = defaultdict(list)
        self._skipped: set[int] = set()
        self._stop: tuple[int, bool] | None = None
        self.fired: dict[Site, int] = {}
        self.forwards = 0

    def visit(self, site: Site, visitor: Visitor) -> None:
        """Add a visitor at a site.

        Raises:
            UnsupportedSiteError: the model has no such site, with the reason.
        """
        name = str(site)
        if name in self.layout.absent:
            raise UnsupportedSiteError(f"{name}: {self.layout.absent[name]}.")
        self._visits[site].append(visitor)

    def skip(self, layers: Iterable[int]) -> None:
        """Let the blocks of these layers hand their input on unchanged, at no cost."""
        self._skipped.update(layers)

    def stop(self, layer: int, *, before: bool = False) -> None:
        """Raise `StopForward` behind the block of this layer, or before it runs; visits there come first."""
        self._stop = (layer, before)

    @contextmanager
    def installed(self) -> Iterator[Instrument]:
        """Install everything; on exit, also after an exception, restore the module."""
        if self._visits and torch.is_grad_enabled():
            refuse_checkpointing(self.module)
        self.fired = dict.fromkeys(self._visits, 0)
        self.forwards = 0
        with ExitStack() as stack:
            count = self.module.register_forward_pre_hook(self._count_forward)
            stack.callback(count.remove)
            for layer in self._skipped:
                block = lookup(self.module, self.layout.block_path(layer))
                forward = hand_on_tuple if self.layout.returns_tuple else hand_on
                stack.enter_context(shadowed_forward(block, forward))
            for site in sorted(self._ported()):
                self._install_port(stack, site)
            tapped_layers = {s.layer for s in self._visits if self._is_tapped(s) and s.layer is not None}
            for layer in sorted(tapped_layers):
                self._install_tap(stack, layer)
            if self.layout.packing is not None:
                for layer in range(self.layout.n_layers):  # rows may have joined on the way
                    block = lookup(self.module, self.layout.block_path(layer))
                    fit = block.register_forward_pre_hook(self.layout.packing.fit, with_kwargs=True)
                    stack.callback(fit.remove)
            if self._stop is not None:
                layer, before = self._stop
                block = lookup(self.module, self.layout.block_path(layer))
                add = block.register_forward_pre_hook if before else block.register_forward_hook
                stack.callback(add(_stop).remove)
            yield self

    def verify(self, *, every: bool = True) -> None:
        """Raise if a visited site did not fire exactly once in every forward since `installed` was entered.

        With ``every=False`` a site may miss some forwards, but not all, and must not fire twice in one.

        Raises:
            ExecutionError: naming the sites.
        """
        least = self.forwards if every else min(1, self.forwards)
        wrong = {str(site): n for site, n in self.fired.items() if not least <= n <= self.forwards}
        if wrong:
            sites = ", ".join(f"{site} ({n})" for site, n in wrong.items())
            raise ExecutionError(
                f"Sites that did not fire once in each of {self.forwards} forwards of "
                f"{type(self.module).__name__} ({self.layout.family.name}): {sites}. "
                "The module does not run these parts as its adapter declares."
            )

    def _count_forward(self, module: nn.Module, args: Any) -> None:
        self.forwards += 1

    def _is_tapped(self, site: Site) -> bool:
        return site.name in TAP_SITES and str(site) not in self.layout.ports

    def _ported(self) -> set[Site]:
        sites = {s for s in self._visits if not self._is_tapped(s)}
        # A visit to the per-head results is written back through the increment that they add up to.
        return sites | {Site(s.layer, "attn_out") for s in sites if s.name == "attn.result"}

    def _run(self, site: Site, value: Tensor) -> Tensor:
        with among_visitors():
            for visitor in self._visits[site]:
                replaced = visitor(value)
                value = value if replaced is None else replaced
        self.fired[site] += 1
        return value

    def _install_port(self, stack: ExitStack, site: Site) -> None:
        if site.name == "attn.result":
            return
        if site.name == "attn_out" and Site(site.layer, "attn.result") in self._visits:
            self._install_result(stack, site)
            return
        self._hook(stack, self.layout.ports[str(site)], lambda value: self._run(site, value))

    def _install_tap(self, stack: ExitStack, layer: int) -> None:
        path = self.layout.attention_path(layer)
        visits = {
            name.removeprefix("attn."): (lambda value, site=Site(layer, name): self._run(site, value))
            for name in TAP_SITES
            if Site(layer, name) in self._visits and self._is_tapped(Site(layer, name))
        }
        attention: nn.Module = lookup(self.module, path)
        stack.enter_context(tapped(attention, visits, path, self.layout.n_heads, self.layout.sequence))

    def _install_result(self, stack: ExitStack, attn_out: Site) -> None:
        """Per-head results: each head's z through its columns of the output projection (and LayerScale)."""
        layer = attn_out.layer
        assert layer is not None
        block: nn.Module = lookup(self.module, self.layout.block_path(layer))
        projection: nn.Linear = lookup(block, self.layout.family.out_projection)
        attention_path = self.layout.attention_path(layer)
        attention: nn.Module = lookup(self.module, attention_path)
        if is_closed(attention):  # it calls its output projection while it is tapped alone
            stack.enter_context(tapped(attention, {}, attention_path, self.layout.n_heads))
        port = self.layout.ports.get(f"blocks.{layer}.attn.result")
        token_first = isinstance(port, Port) and port.token_first
        packing = self.layout.sequence
        merged: list[Tensor] = []
        result_site = Site(layer, "attn.result")

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            z = args[0] if packing is None else packing.unpack(args[0].flatten(0, -2))
            merged.append(z.transpose(0, 1) if token_first else z)
            _EDITED_RESULTS.pop(projection, None)

        def forget(module: nn.Module, args: Any, output: Any) -> None:
            _EDITED_RESULTS.pop(projection, None)

        def visit(value: Tensor) -> Tensor:
            z = projected(merged, self.layout.family.out_projection, layer)
            result = _EDITED_RESULTS.get(projection)
            if result is None:
                heads, scale = head_weights(self.module, self.layout, layer)
                shape = heads.shape[1:]
                z = z[..., : shape.numel()].reshape(*value.shape[:-1], *shape)
                result = torch.einsum("...hd,mhd->...hm", z, heads)
                if scale is not None:
                    result = result * scale
            # Under autograd what is seen is an alias, so that the gradient of the output reaches it.
            seen = result.view_as(result) if result.requires_grad else result
            edited = self._run(result_site, seen)
            if edited is not seen:
                _EDITED_RESULTS[projection] = edited
            if edited is not result:
                value = value + (edited - result).sum(dim=-2)
            return self._run(attn_out, value) if attn_out in self._visits else value

        stack.callback(projection.register_forward_pre_hook(keep).remove)
        stack.callback(block.register_forward_hook(forget).remove)
        self._hook(stack, self.layout.ports[str(attn_out)], visit)

    def _hook(
        self, stack: ExitStack, port: Port | Difference | Share, visit: Callable[[Tensor], Tensor]
    ) -> None:
        if isinstance(port, Difference):
            self._hook_difference(stack, port, visit)
            return
        if isinstance(port, Share):
            self._hook_share(stack, port, visit)
            return
        module: nn.Module = lookup(self.module, port.path)
        meant = self._counting(stack, port)
        if port.side == "input":

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return replace_input(port, args, kwargs, visit) if meant() else None

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        else:

            def after(module: nn.Module, args: Any, output: Any) -> Any:
                return replace_output(port, output, visit) if meant() else None

            stack.callback(hook_output(module, after, first=self.layout.family.recorded).remove)

    def _counting(self, stack: ExitStack, port: Port) -> Callable[[], bool]:
        """A function to be asked at every call of a port's module: is this the call that is meant?"""
        if port.call is None:
            return lambda: True
        calls = [0]

        def begin(module: nn.Module, args: Any) -> None:
            calls[0] = 0

        def meant() -> bool:
            calls[0] += 1
            return calls[0] - 1 == port.call

        block: nn.Module = lookup(self.module, port.scope)
        stack.callback(block.register_forward_pre_hook(begin).remove)
        return meant

    def _hook_difference(self, stack: ExitStack, port: Difference, visit: Callable[[Tensor], Tensor]) -> None:
        """Visit an increment where the site behind it is reached, before that site's own visits."""
        earlier: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            earlier[:] = [value]
            return value

        def increment(value: Tensor) -> Tensor:
            before = earlier.pop()
            found = value - before
            new = visit(found)
            if new is found and not value.requires_grad:
                return value
            # What is written back as it was leaves the stream as it was, to the last bit.
            return torch.where(new == found, value + (new - found), before + new)

        self._hook(stack, self.layout.ports[port.minus], keep)
        self._hook(stack, self.layout.ports[port.of], increment)

    def _hook_share(self, stack: ExitStack, share: Share, visit: Callable[[Tensor], Tensor]) -> None:
        """Visit a share of an increment where the sum is put out."""
        projection: nn.Linear = lookup(self.module, share.projection)
        scale: Any = None if share.scale is None else lookup(self.module, share.scale)
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept[:] = [args[0]]

        def move(module: nn.Module, args: Any, total: Tensor) -> Tensor | None:
            found = contribution(share, projection, kept.pop())
            found = found if is_missing(scale) else found * scale
            new = visit(found)
            return None if new is found else total + (new - found)

        stack.callback(projection.register_forward_pre_hook(keep).remove)
        through: nn.Module = lookup(self.module, share.through)
        stack.callback(through.register_forward_hook(move).remove)


def _stop(module: nn.Module, args: Any, output: Any = None) -> None:
    raise StopForward
