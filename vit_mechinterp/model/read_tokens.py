"""Which tokens of the last block a model's output reads: tried out, not declared."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Instrument
from vit_mechinterp.model.layout import lookup
from vit_mechinterp.model.narrowing import Narrowing, forget, is_watched
from vit_mechinterp.model.sparing import share_of, why_nothing_is_spared
from vit_mechinterp.spec import Site

__all__ = ["ReadTokens", "read_tokens"]

_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], float | None]] = (
    weakref.WeakKeyDictionary()
)
"""By last block, and by what it consists of and the tokens: the share of the block that is left out for each
other token, or None if the block cannot be narrowed to them."""


@dataclass(frozen=True)
class ReadTokens:
    """What the output reads of the last residual stream, where that is not all of it.

    Args:
        tokens: positions, ascending.
        names: what these tokens are called.
        n_tokens: number of tokens of the stream.
        share: the part of the last block's work that its attention call is the beginning of.
    """

    tokens: tuple[int, ...]
    names: tuple[str, ...]
    n_tokens: int
    share: float

    def saved(self, tokens: tuple[int, ...]) -> float:
        """Share of the last block's work that a row is spared, if it goes on with some tokens alone."""
        return self.share * (1 - len(tokens) / self.n_tokens)


def read_tokens(vit: HookedViT) -> ReadTokens | None:
    """Try out which tokens the output reads, and whether the last block gives the same without the others.

    Random streams take the place of the last block's output: what changes the output is read. The head may
    be another one tomorrow, so this is done anew at every call; it costs a forward without blocks. Whether
    the block itself can be narrowed is tried once for what it consists of.

    Returns:
        None where all tokens are read, the model has no others than patches, hooks of the user's would see
        what is left out, the block's parts do not work token by token, or memory does not suffice to try.
    """
    try:
        return _tried(vit)
    except torch.OutOfMemoryError:
        return None


def _tried(vit: HookedViT) -> ReadTokens | None:
    layout = vit.layout
    last = layout.n_layers - 1
    if why_nothing_is_spared(layout) is not None or next(vit.module.parameters()).is_meta:
        return None
    if {f"blocks.{last}.resid_pre", f"blocks.{last}.resid_post"} & set(layout.absent):
        return None
    prefix, n = len(layout.tokens.prefix), layout.tokens.n_tokens
    special = [*range(prefix), *range(prefix + layout.tokens.n_patches, n)]
    block: nn.Module = lookup(vit.module, layout.block_path(last))
    with vit.lock, torch.no_grad():
        if not special or is_watched(vit.module):
            return None
        tokens = _read_by_output(vit, special)
        if not tokens:
            return None
        known, key = _KNOWN.setdefault(block, {}), (tokens, *_parts_of(block))
        if key not in known:
            known.clear()
            forget(block)
            known[key] = _share(vit, tokens)
    share = known[key]
    if share is None:
        return None
    every = (*layout.tokens.prefix, *layout.tokens.suffix)
    names = dict.fromkeys(name for place, name in zip(special, every, strict=True) if place in tokens)
    return ReadTokens(tokens, tuple(names), n, share)


def _parts_of(block: nn.Module) -> list[tuple[int, int, int]]:
    """What a block consists of: its modules, and the functions that they run."""
    return [(id(part), id(type(part).forward), id(vars(part).get("forward"))) for part in block.modules()]


def _read_by_output(vit: HookedViT, special: list[int]) -> tuple[int, ...]:
    """Those of some tokens that the output reads; none if it reads others too."""
    n_layers, n = vit.layout.n_layers, vit.layout.tokens.n_tokens
    others = sorted(set(range(n)) - set(special))

    def streams(value: Tensor) -> Tensor:
        pair = _random(2, value)
        rows = pair[:1].repeat(2 + len(special), 1, 1)
        rows[1, others] = pair[1, others]
        for row, token in enumerate(special, start=2):
            rows[row, token] = pair[1, token]
        return rows

    output = _run(vit, Site(n_layers - 1, "resid_post"), range(n_layers), streams, 2 + len(special))
    if output is None:
        return ()
    # A row that nothing changed may still be rounded otherwise than its neighbour.
    precise = vit.dtype in (torch.float32, torch.float64)
    rounding = 4 * torch.finfo(torch.float32).eps * float(output.abs().max()) if precise else 0.0
    moved = ((output - output[0]).abs().flatten(1).amax(1) > rounding).tolist()
    return () if moved[1] else tuple(token for token, own in zip(special, moved[2:], strict=True) if own)


def _share(vit: HookedViT, tokens: tuple[int, ...]) -> float | None:
    """The share of the last block that is narrowed to some tokens; None if the output is another then."""
    n_layers = vit.layout.n_layers
    site, before = Site(n_layers - 1, "resid_pre"), range(n_layers - 1)
    narrowing = Narrowing(vit.module, vit.layout, tokens)
    whole = _run(vit, site, before, lambda value: _random(2, value), 2)
    for _ in range(2):  # the first call of a module is there to compare it with itself
        few = _run(vit, site, before, lambda value: _random(2, value), 2, narrowing)
    if whole is None or few is None:
        return None
    tolerance = 1e-4 if vit.dtype in (torch.float32, torch.float64) else 3e-2
    if not bool((whole - few).abs().max() <= tolerance * whole.abs().max()):
        return None
    share = share_of(vit.module, vit.layout, n_layers - 1, narrowing.narrowed, call=narrowing.called)
    return share or None


def _random(rows: int, like: Tensor) -> Tensor:
    """Streams that are the same at every call, ``[row, token, d_model]``."""
    draw = torch.randn(rows, *like.shape[1:], generator=torch.Generator().manual_seed(0))
    return draw.to(like)


def _run(
    vit: HookedViT,
    site: Site,
    skipped: range,
    streams: Callable[[Tensor], Tensor],
    rows: int,
    narrowing: Narrowing | None = None,
) -> Tensor | None:
    """The output ``[row, ...]`` in float32 if a site's value is replaced and the blocks before are skipped;
    None where the stream has other axes than the layout says."""
    fits = True

    def visitor(value: Tensor) -> Tensor:
        nonlocal fits
        fits = value.ndim == 3 and value.shape[1] == vit.layout.tokens.n_tokens
        return streams(value) if fits else value

    instrument = Instrument(vit.module, vit.layout)
    instrument.skip(skipped)
    instrument.visit(site, visitor)
    with instrument.installed(), nullcontext() if narrowing is None else narrowing.installed():
        output: Tensor = vit(vit.beginning(rows))
    if not fits or len(output) != rows:
        return None
    return output.float()
