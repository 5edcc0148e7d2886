"""What a model's output reads of the last block, and behind it: tried out, not declared."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vit_mechinterp.model.as_made import is_as_made
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Instrument, Visitor
from vit_mechinterp.model.layout import lookup
from vit_mechinterp.model.narrowing import Narrowing, forget, mixes_tokens
from vit_mechinterp.model.sparing import share_of, why_nothing_is_spared
from vit_mechinterp.spec import BLOCK_SITES, GLOBAL_SITES, Site

__all__ = ["ReadTokens", "adds_up", "follows_from", "handed_on", "is_by_token", "read_tokens"]

_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], tuple[float, float] | None]] = (
    weakref.WeakKeyDictionary()
)
"""By last block, and by what it consists of, its weights, its precision and the tokens: the shares of
`ReadTokens`, or None if the block cannot be narrowed."""
_TRIED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, tuple[object, ...]], bool]] = (
    weakref.WeakKeyDictionary()
)
"""By block, and by what was tried, what the block consists of, its weights and precision: what came out."""

Found = TypeVar("Found")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadTokens:
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


def read_tokens(vit: HookedViT) -> ReadTokens | None:
    """Try out which tokens the output reads, and whether the last block gives the same without the others.

    Random streams take the place of the last block's output: what changes the output, or ``pooled``, is read.
    The head may be another one tomorrow, so this is done anew at every call; it costs a few forwards
    without blocks. Whether the block itself can be narrowed is tried once for its parts and weights.

    Returns:
        None where all tokens are read, the model has no others than patches, it is not as its library made it
        (see `is_as_made`), the block's parts do not work token by token, or trying failed.
    """
    return _tried(vit, _found, "resid_pre") if why_nothing_is_spared(vit.layout) is None else None


def follows_from(vit: HookedViT, site: Site) -> bool:
    """Try out whether the output, and everything else behind a site behind the blocks, follows from what is
    there alone.

    Streams that differ are given the same value at the site: nothing behind it may tell them apart. False
    where the site is absent, the model is not as its library made it, or trying failed.
    """
    behind = GLOBAL_SITES[GLOBAL_SITES.index(site.name) + 1 :]

    def found(vit: HookedViT) -> bool:
        last = Site(vit.layout.n_layers - 1, "resid_post")

        def moved(also: Mapping[Site, Visitor]) -> bool:
            replaced: dict[Site, Visitor] = {last: lambda value: _random(2, value), **also}
            values = _run(vit, replaced, range(vit.layout.n_layers), 2, behind)
            return values is None or any(bool(_moved(vit, own)[1]) for own in values.values())

        return moved({}) and not moved({site: lambda value: value[:1].repeat(2, *[1] * (value.ndim - 1))})

    return site.name not in vit.layout.absent and bool(_tried(vit, found))


def handed_on(vit: HookedViT) -> frozenset[int]:
    """Try out which blocks are given the output of the one before as it is, the first one that of the
    embedding; none if the model is not as its library made it, or trying failed."""
    layers = range(vit.layout.n_layers)
    sites = ["embed", *(f"blocks.{layer}.{name}" for layer in layers for name in ("resid_pre", "resid_post"))]

    def found(vit: HookedViT) -> frozenset[int]:
        values = _run(vit, {Site(None, "embed"): lambda value: _random(2, value)}, layers, 2, sites) or {}

        def is_given(layer: int) -> bool:
            output = values.get(f"blocks.{layer - 1}.resid_post" if layer else "embed")
            given = values.get(f"blocks.{layer}.resid_pre")
            return output is not None and given is not None and torch.equal(output, given)

        return frozenset(filter(is_given, layers))

    return _tried(vit, found) or frozenset()


def is_by_token(vit: HookedViT, layer: int) -> bool:
    """Try out whether the tokens of a block reach each other in its attention call alone.

    Every second token of the block's input and of what the call gives is changed: the others must come out
    as they do without, and be what they were on the way. False if the model is not as its library made it, or
    trying failed.
    """
    absent, of_call = vit.layout.absent, ("attn.scores", "attn.pattern", "attn.z")
    stream, *sites, output = (Site(layer, name) for name in BLOCK_SITES if name not in of_call)
    inner = Site(layer, "attn.z")
    inner = inner if str(inner) not in absent else Site(layer, "attn_out")

    def changed(value: Tensor, seed: int) -> Tensor:
        pair = _random(2, value, seed)
        pair[1, 1::2] = pair[0, 1::2]
        return pair

    def tried(vit: HookedViT) -> bool:
        others = [other for other in range(vit.layout.n_layers) if other != layer]
        replaced: dict[Site, Visitor] = {stream: partial(changed, seed=0), inner: partial(changed, seed=1)}
        values = _run(vit, replaced, others, 2, [str(site) for site in (*sites, output)])
        if values is None:
            return False
        stay = not any(_moved(vit, own[:, 1::2])[1] for name, own in values.items() if name != "output")
        return stay and bool(_moved(vit, values[str(output)][:, ::2])[1])

    is_there = not {str(stream), str(inner), str(output)} & set(absent)
    return is_there and _of_block(vit, layer, "by token", tried)


def adds_up(vit: HookedViT, layer: int) -> bool:
    """Try out whether a block puts out the sum of its input and of what attention and MLP add to it. False if
    it lacks one of these sites, the model is not as its library made it, or trying failed."""
    sites = [Site(layer, name) for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    names = list(map(str, sites))

    def tried(vit: HookedViT) -> bool:
        others = [other for other in range(vit.layout.n_layers) if other != layer]
        values = _run(vit, {sites[0]: lambda x: _random(2, x)}, others, 2, names)
        if values is None:
            return False
        *parts, whole = (values[name] for name in names)
        return bool((sum(parts) - whole).abs().max() <= 2e-6 * whole.abs().max())

    return not set(names) & set(vit.layout.absent) and _of_block(vit, layer, "adds up", tried)


def _of_block(vit: HookedViT, layer: int, what: str, tried: Callable[[HookedViT], bool]) -> bool:
    """What trying a block out gave, once for its parts and weights."""

    def found(vit: HookedViT) -> bool:
        block: nn.Module = lookup(vit.module, vit.layout.block_path(layer))
        known, state = _TRIED.setdefault(block, {}), _state_of(vit, block)
        if (what, state) not in known:
            for other in [own for own in known if own[0] == what]:
                del known[other]
            known[what, state] = tried(vit)
        return known[what, state]

    return bool(_tried(vit, found))


def _tried(vit: HookedViT, found: Callable[[HookedViT], Found | None], *sites: str) -> Found | None:
    """What is found out about a model that is as its library made it, and has some sites of the last block
    beside its output."""
    last = vit.layout.n_layers - 1
    absent = {f"blocks.{last}.{name}" for name in (*sites, "resid_post")} & set(vit.layout.absent)
    if absent or next(vit.module.parameters()).is_meta:
        return None
    with vit.lock, torch.no_grad():
        if not is_as_made(vit.module):
            return None
        try:
            return found(vit)
        except Exception as error:  # an experiment is not worse off for it: more is computed
            logger.debug("%s was not tried out: %s", type(vit.module).__name__, error)
            return None


def _found(vit: HookedViT) -> ReadTokens | None:
    layout = vit.layout
    prefix, n = len(layout.tokens.prefix), layout.tokens.n_tokens
    special = [*range(prefix), *range(prefix + layout.tokens.n_patches, n)]
    tokens = _read_by_output(vit, special) if special else ()
    if not tokens:
        return None
    block: nn.Module = lookup(vit.module, layout.block_path(layout.n_layers - 1))
    known, key = _KNOWN.setdefault(block, {}), (tokens, *_state_of(vit, block))
    if key not in known:
        known.clear()
        forget(block)
        known[key] = _shares(vit, block, tokens)
    shares = known[key]
    return None if shares is None else ReadTokens(tokens, n, *shares)


def _state_of(vit: HookedViT, block: nn.Module) -> tuple[object, ...]:
    """What a block computes: its precision, what it consists of, and its weights."""
    kind = vit.device.type
    precision = vit.dtype, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return precision, *_parts_of(block), *_norms_of(block)


def _parts_of(block: nn.Module) -> list[tuple[int, int]]:
    """What a block consists of: its modules, and the functions that they run."""
    return [(id(part), id(type(part).forward)) for part in block.modules()]


def _norms_of(block: nn.Module) -> list[float]:
    """Norms of a block's weights: a part whose weights are zeros hides what it would make of other tokens."""
    weights = [
        own.detach().float() for own in (*block.parameters(), *block.buffers()) if own.is_floating_point()
    ]
    found: list[float] = torch.stack(torch._foreach_norm(weights)).tolist() if weights else []
    return found


def _read_by_output(vit: HookedViT, special: list[int]) -> tuple[int, ...]:
    """Those of some tokens that the output or ``pooled`` reads; none if either reads others too."""
    n_layers, n = vit.layout.n_layers, vit.layout.tokens.n_tokens
    others = sorted(set(range(n)) - set(special))
    rows, moved = 2 + len(special), torch.zeros(2 + len(special), dtype=torch.bool)
    for seed, scale in enumerate((1.0, 1.0, 0.1, 10.0)):

        def streams(value: Tensor, seed: int = seed, scale: float = scale) -> Tensor:
            pair = scale * _random(2, value, seed)
            changed = pair[:1].repeat(rows, 1, 1)
            changed[1, others] = pair[1, others]
            for row, token in enumerate(special, start=2):
                changed[row, token] = pair[1, token]
            return changed

        site = Site(n_layers - 1, "resid_post")
        found = _run(vit, {site: streams}, range(n_layers), rows, ("pooled",))
        if found is None:
            return ()
        for values in found.values():
            moved |= _moved(vit, values)
    return () if moved[1] else tuple(token for token, own in zip(special, moved[2:], strict=True) if own)


def _moved(vit: HookedViT, values: Tensor) -> Tensor:
    """Rows that are not the first one's over again, ``[row]``."""
    # A row that nothing changed may still be rounded otherwise than its neighbour.
    precise = vit.dtype in (torch.float32, torch.float64)
    rounding = 4 * torch.finfo(torch.float32).eps * float(values.abs().max()) if precise else 0.0
    return ~((values - values[0]).abs().flatten(1).amax(1) <= rounding).cpu()


def _shares(vit: HookedViT, block: nn.Module, tokens: tuple[int, ...]) -> tuple[float, float] | None:
    """The shares of the last block's work that narrowing spares; None if the values of the tokens that are
    read, or the output, are others then."""
    n_layers = vit.layout.n_layers
    site, before = Site(n_layers - 1, "resid_pre"), range(n_layers - 1)
    last = f"blocks.{n_layers - 1}.resid_post"
    n_patches, prefix = vit.layout.tokens.n_patches, len(vit.layout.tokens.prefix)
    patches = prefix + np.random.default_rng(0).permutation(n_patches)[: max(1, n_patches // 4)]
    some = tuple(sorted({*tokens, *patches.tolist()}))
    precise = vit.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(vit.device.type)

    def run(narrowing: Narrowing | None = None) -> dict[str, Tensor] | None:
        return _run(vit, {site: lambda value: _random(2, value)}, before, 2, (last,), narrowing)

    whole = run()
    for few, opened in ((tokens, True), (some, True), (some, False), (tokens, False)):
        narrowing = Narrowing(vit.module, vit.layout, few, opened=opened)
        for _ in range(2):  # the first call of a module is there to compare it with itself
            found = run(narrowing)
        if whole is None or found is None or mixes_tokens(block):
            return None
        for name, values in found.items():
            expected = whole[name]
            if name == last:
                values, expected = values[:, list(few)], expected[:, list(few)]
            tolerance = (2e-6 if precise else 3e-2) * expected.abs().max()
            if not bool((values - expected).abs().max() <= tolerance):
                return None
    parts = narrowing.narrowed  # of the last trial, which is how waves run: the tokens read, nothing opened
    attention: nn.Module = lookup(vit.module, vit.layout.attention_path(n_layers - 1))
    outside = parts - set(attention.modules())
    share = share_of(vit.module, vit.layout, n_layers - 1, parts, call=narrowing.called)
    return (share, share_of(vit.module, vit.layout, n_layers - 1, outside)) if share else None


def _random(rows: int, like: Tensor, seed: int = 0) -> Tensor:
    """Streams that are the same at every call, ``[row, token, d_model]``."""
    draw = torch.randn(rows, *like.shape[1:], generator=torch.Generator().manual_seed(seed))
    return draw.to(like)


def _run(
    vit: HookedViT,
    replaced: Mapping[Site, Visitor],
    skipped: Iterable[int],
    rows: int,
    keep: Sequence[str],
    narrowing: Narrowing | None = None,
) -> dict[str, Tensor] | None:
    """The output, and values at some sites that the model has, ``[row, ...]`` in float32, if values are
    replaced, first the residual stream, and blocks are skipped; None where the stream has other axes than the
    layout says."""
    fits = True
    found: dict[str, Tensor] = {}
    (stream, streams), *others = replaced.items()

    def visitor(value: Tensor) -> Tensor | None:
        nonlocal fits
        fits = value.ndim == 3 and value.shape[1] == vit.layout.tokens.n_tokens
        return streams(value) if fits else value

    def keeping(name: str) -> Callable[[Tensor], None]:
        return lambda value: found.update({name: value.float()})

    instrument = Instrument(vit.module, vit.layout)
    instrument.skip(skipped)
    instrument.visit(stream, visitor)
    for site, change in others:
        instrument.visit(site, change)
    for name in keep:
        if name not in vit.layout.absent:
            instrument.visit(Site.parse(name), keeping(name))
    with instrument.installed(), nullcontext() if narrowing is None else narrowing.installed():
        found["output"] = vit(vit.beginning(rows)).float()
    return found if fits and all(len(values) == rows for values in found.values()) else None
