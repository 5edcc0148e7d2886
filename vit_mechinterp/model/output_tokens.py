"""What a model's output reads of the last block, and behind it: tried out, not declared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.layout import lookup
from vit_mechinterp.model.narrowing import Narrowing, forget, mixes_tokens
from vit_mechinterp.model.sparing import share_of, why_nothing_is_spared
from vit_mechinterp.model.trials import forward, moved, random_streams, remembered, tried
from vit_mechinterp.spec import Site

__all__ = ["OutputTokens", "output_tokens"]


_SCALES = (1.0, 1.0, 0.1, 10.0)
"""Sizes of the streams that are tried: a head that saturates at one may hide there what it reads."""
_NUMBERS = 2**20
"""Numbers of the streams that are tried in one forward at most, unless one size takes more."""
_PRECISE, _COARSE = 2e-6, 3e-2
"""How far a narrowed block may be from the whole one, of the largest value: in float32 and float64, and in
fewer bits."""


@dataclass(frozen=True)
class OutputTokens:
    """What the output reads of the last residual stream, where that is not all of it.

    Args:
        tokens: positions, ascending.
        n_tokens: number of tokens of the stream.
        share: the part of the last block's work that a token is spared which nobody reads.
        share_behind_attention: the same where scores or pattern are looked at, so that the attention call
            and the output projection run for all tokens.
    """

    tokens: tuple[int, ...]
    n_tokens: int
    share: float
    share_behind_attention: float

    def saved(self, tokens: tuple[int, ...], *, attention_whole: bool = False) -> float:
        """Share of the last block's work that a row is spared, if it goes on with some tokens alone."""
        share = self.share_behind_attention if attention_whole else self.share
        return share * (1 - len(tokens) / self.n_tokens)


def output_tokens(vit: HookedViT) -> OutputTokens | None:
    """Try out which tokens the output reads, and whether the last block gives the same without the others.

    Random streams take the place of the last block's output: what changes the output, or ``pooled``, is read.
    The head may be another one tomorrow, so this is done anew at every call; it costs a few forwards
    without blocks. Whether the block itself can be narrowed is tried once for its parts and weights.

    Returns:
        None where all tokens are read, the model has no others than patches, it is not as its library made it
        (see `is_as_made`), the block's parts do not work token by token, or trying failed.
    """
    return tried(vit, _found, "resid_pre") if why_nothing_is_spared(vit.layout) is None else None


def _found(vit: HookedViT) -> OutputTokens | None:
    layout = vit.layout
    prefix, n = len(layout.tokens.prefix), layout.tokens.n_tokens
    special = [*range(prefix), *range(prefix + layout.tokens.n_patches, n)]
    tokens = _read_by_output(vit, special) if special else ()
    if not tokens:
        return None
    block: nn.Module = lookup(vit.module, layout.block_path(layout.n_layers - 1))
    shares = remembered(vit, block, "narrowed", lambda: _shares(vit, block, tokens), tokens)
    return None if shares is None else OutputTokens(tokens, n, *shares)


def _read_by_output(vit: HookedViT, special: list[int]) -> tuple[int, ...]:
    """Those of some tokens that the output or ``pooled`` reads; none if either reads others too."""
    n_layers, n = vit.layout.n_layers, vit.layout.tokens.n_tokens
    others = sorted(set(range(n)) - set(special))
    rows = 2 + len(special)

    def changed(value: Tensor, seeds: range) -> Tensor:
        streams = value.new_empty(len(seeds), rows, *value.shape[1:])
        for own, seed in zip(streams, seeds, strict=True):
            one, other = _SCALES[seed] * random_streams(2, value, seed)
            own[:] = one
            own[1, others] = other[others]
            for row, token in enumerate(special, start=2):
                own[row, token] = other[token]
        return streams.flatten(0, 1)

    several: list[Tensor] = []
    together = max(1, _NUMBERS // (rows * n * vit.layout.d_model))
    for first in range(0, len(_SCALES), together):
        seeds = range(first, min(first + together, len(_SCALES)))
        site, streams = Site(n_layers - 1, "resid_post"), partial(changed, seeds=seeds)
        found = forward(vit, {site: streams}, range(n_layers), rows * len(seeds), ("pooled",))
        if found is None:
            return ()
        several += [moved(vit, own) for values in found.values() for own in torch.split(values, rows)]
    others_are_read, *read = torch.stack(several).any(dim=0)[1:].tolist()
    return () if others_are_read else tuple(token for token, own in zip(special, read, strict=True) if own)


def _shares(vit: HookedViT, block: nn.Module, tokens: tuple[int, ...]) -> tuple[float, float] | None:
    """The shares of the last block's work that narrowing spares; None if the values of the tokens that are
    read, or the output, are others then, so that the block cannot be narrowed."""
    forget(block)
    n_layers = vit.layout.n_layers
    site, before = Site(n_layers - 1, "resid_pre"), range(n_layers - 1)
    last = f"blocks.{n_layers - 1}.resid_post"
    n_patches, prefix = vit.layout.tokens.n_patches, len(vit.layout.tokens.prefix)
    patches = prefix + np.random.default_rng(0).permutation(n_patches)[: max(1, n_patches // 4)]
    some = tuple(sorted({*tokens, *patches.tolist()}))

    def run(narrowing: Narrowing | None = None) -> dict[str, Tensor] | None:
        return forward(vit, {site: lambda value: random_streams(2, value)}, before, 2, (last,), narrowing)

    whole = run()
    for few, opened in ((tokens, True), (some, True), (some, False), (tokens, False)):
        narrowing = Narrowing(vit.module, vit.layout, few, opened=opened)
        for _ in range(2):  # the first call of a module is there to compare it with itself
            found = run(narrowing)
        if whole is None or found is None or mixes_tokens(block):
            return None
        pairs = [(values, whole[name]) for name, values in found.items() if name != last]
        pairs.append((found[last][:, list(few)], whole[last][:, list(few)]))
        if not all(_agree(vit, values, expected) for values, expected in pairs):
            return None
    parts = narrowing.narrowed  # of the last trial, which is how waves run: the tokens read, nothing opened
    attention: nn.Module = lookup(vit.module, vit.layout.attention_path(n_layers - 1))
    outside = parts - set(attention.modules())
    share = share_of(vit.module, vit.layout, n_layers - 1, parts, call=narrowing.called)
    return (share, share_of(vit.module, vit.layout, n_layers - 1, outside)) if share else None


def _agree(vit: HookedViT, values: Tensor, expected: Tensor) -> bool:
    """Whether values are those that are expected, as exactly as the model computes; NaN never is."""
    precise = vit.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(vit.device.type)
    tolerance = (_PRECISE if precise else _COARSE) * expected.abs().max()
    return bool((values - expected).abs().max() <= tolerance)
