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
from vit_mechinterp.model.layout import TAP_SITES, Layout, Port, is_missing, lookup
from vit_mechinterp.model.tap import shadowed_forward, tapped
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
        self._refuse_checkpointing()
        self.fired = dict.fromkeys(self._visits, 0)
        self.forwards = 0
        with ExitStack() as stack:
            count = self.module.register_forward_pre_hook(self._count_forward)
            stack.callback(count.remove)
            for layer in self._skipped:
                block = lookup(self.module, self.layout.block_path(layer))
                stack.enter_context(shadowed_forward(block, _hand_on))
            for site in sorted(self._ported()):
                self._install_port(stack, site)
            for layer in sorted(
                {s.layer for s in self._visits if s.name in TAP_SITES and s.layer is not None}
            ):
                self._install_tap(stack, layer)
            if self._stop is not None:
                layer, before = self._stop
                block = lookup(self.module, self.layout.block_path(layer))
                add = block.register_forward_pre_hook if before else block.register_forward_hook
                stack.callback(add(_stop).remove)
            yield self

    def _refuse_checkpointing(self) -> None:
        if not (self._visits and torch.is_grad_enabled()):
            return
        for path, part in self.module.named_modules():
            own = vars(part)
            if own.get("grad_checkpointing") or (own.get("gradient_checkpointing") and part.training):
                raise ExecutionError(
                    f"{path or type(part).__name__} uses gradient checkpointing: its blocks run again in the "
                    "backward pass, when visitors are gone. Switch it off, or run under torch.no_grad()."
                )

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

    def _ported(self) -> set[Site]:
        sites = {s for s in self._visits if s.name not in TAP_SITES}
        # A visit to the per-head results is written back through the increment that they add up to.
        return sites | {Site(s.layer, "attn_out") for s in sites if s.name == "attn.result"}

    def _run(self, site: Site, value: Tensor) -> Tensor:
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
        port = self.layout.ports[str(site)]
        self._hook(stack, port, lambda value: self._run(site, value))

    def _install_tap(self, stack: ExitStack, layer: int) -> None:
        path = self.layout.attention_path(layer)
        visits = {
            name.removeprefix("attn."): (lambda value, site=Site(layer, name): self._run(site, value))
            for name in TAP_SITES
            if Site(layer, name) in self._visits
        }
        stack.enter_context(tapped(lookup(self.module, path), visits, path))

    def _install_result(self, stack: ExitStack, attn_out: Site) -> None:
        """Per-head results: each head's z through its columns of the output projection (and LayerScale)."""
        layer = attn_out.layer
        assert layer is not None
        block: nn.Module = lookup(self.module, self.layout.block_path(layer))
        projection: nn.Linear = lookup(block, self.layout.family.out_projection)
        scales = [lookup(block, path) for path in self.layout.family.attention_scale]
        scale = next((s for s in scales if not is_missing(s)), None)
        merged: list[Tensor] = []
        result_site = Site(layer, "attn.result")

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            merged.append(args[0])
            _EDITED_RESULTS.pop(projection, None)

        def forget(module: nn.Module, args: Any, output: Any) -> None:
            _EDITED_RESULTS.pop(projection, None)

        def visit(value: Tensor) -> Tensor:
            z = merged.pop()
            result = _EDITED_RESULTS.get(projection)
            if result is None:
                heads = projection.weight.reshape(len(projection.weight), -1, self.layout.d_head)
                z = z.reshape(*value.shape[:-1], heads.shape[1], self.layout.d_head)
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

    def _hook(self, stack: ExitStack, port: Port, visit: Callable[[Tensor], Tensor]) -> None:
        module: nn.Module = lookup(self.module, port.path)
        if port.side == "input":

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return _replace_input(port, args, kwargs, visit)

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        else:

            def after(module: nn.Module, args: Any, output: Any) -> Any:
                return _replace_output(port, output, visit)

            stack.callback(module.register_forward_hook(after).remove)


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _stop(module: nn.Module, args: Any, output: Any = None) -> None:
    raise StopForward


def _replace_input(
    port: Port, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    name = None if args else next(iter(kwargs))
    value = args[0] if name is None else kwargs[name]
    if port.in_place:
        # Visitors are given a copy: what one of them keeps must not change when another one writes.
        value.copy_(visit(value.clone()))
        return None
    new = _visit_part(port, value, visit)
    if new is value:
        return None
    return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})


def _replace_output(port: Port, output: Any, visit: Callable[[Tensor], Tensor]) -> Any:
    if port.field is not None:
        value = output[port.field]
        new = _visit_part(port, value, visit)
        if new is not value:
            # A copy, so that the caller's view of the native output type is kept and nothing else changes.
            output = type(output)(**{**output, port.field: new})
        return output
    if isinstance(output, tuple):
        return (_visit_part(port, output[0], visit), *output[1:])
    return _visit_part(port, output, visit)


def _visit_part(port: Port, value: Tensor, visit: Callable[[Tensor], Tensor]) -> Tensor:
    if port.part is None:
        return visit(value)
    index, count = port.part
    chunks = list(value.chunk(count, dim=-1))
    new = visit(chunks[index])
    if new is chunks[index] and not value.requires_grad:
        return value
    chunks[index] = new
    return torch.cat(chunks, dim=-1)
