"""How a model's parts hang together, as far as an experiment depends on it: tried out, not declared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Visitor
from vit_mechinterp.model.layout import lookup
from vit_mechinterp.model.trials import attempted, forward, moved, random_streams, remembered, tried
from vit_mechinterp.spec import BLOCK_SITES, GLOBAL_SITES, Site

__all__ = ["adding_up", "by_token", "follows_from", "handed_on"]


def follows_from(vit: HookedViT, site: Site) -> bool:
    """Try out whether the output, and everything else behind a site behind the blocks, follows from what is
    there alone.

    Streams that differ are given the same value at the site: nothing behind it may tell them apart. False
    where the site is absent, the model is not as its library made it, or trying failed.
    """
    behind = GLOBAL_SITES[GLOBAL_SITES.index(site.name) + 1 :]

    def found(vit: HookedViT) -> bool:
        last = Site(vit.layout.n_layers - 1, "resid_post")

        def differ(also: Mapping[Site, Visitor]) -> bool:
            replaced: dict[Site, Visitor] = {last: lambda value: random_streams(2, value), **also}
            values = forward(vit, replaced, range(vit.layout.n_layers), 2, behind)
            return values is None or any(bool(moved(vit, own)[1]) for own in values.values())

        return differ({}) and not differ({site: lambda value: value[:1].repeat(2, *[1] * (value.ndim - 1))})

    return site.name not in vit.layout.absent and bool(tried(vit, found))


def handed_on(vit: HookedViT) -> frozenset[int]:
    """Try out which blocks are given the output of the one before as it is, the first one that of the
    embedding; none if the model is not as its library made it, or trying failed."""
    layers = range(vit.layout.n_layers)
    sites = ["embed", *(f"blocks.{layer}.{name}" for layer in layers for name in ("resid_pre", "resid_post"))]

    def found(vit: HookedViT) -> frozenset[int]:
        replaced: dict[Site, Visitor] = {Site(None, "embed"): lambda value: random_streams(2, value)}
        values = forward(vit, replaced, layers, 2, sites) or {}

        def is_given(layer: int) -> bool:
            output = values.get(f"blocks.{layer - 1}.resid_post" if layer else "embed")
            given = values.get(f"blocks.{layer}.resid_pre")
            return output is not None and given is not None and torch.equal(output, given)

        return frozenset(filter(is_given, layers))

    return tried(vit, found) or frozenset()


def by_token(vit: HookedViT) -> frozenset[int]:
    """Try out in which blocks tokens reach each other in the attention call alone; none if the model is not
    as its library made it, or trying failed.

    Every second token of a block's input and of what the call gives is changed: the others must come out as
    they do without, and be what they were on the way.
    """
    return _blocks(vit, "by token", _is_by_token)


def adding_up(vit: HookedViT) -> frozenset[int]:
    """Try out which blocks put out the sum of their input and of what attention and MLP add to it; none that
    lacks one of these sites, or if the model is not as its library made it, or trying failed."""
    return _blocks(vit, "adds up", _adds_up)


def _is_by_token(vit: HookedViT, layer: int) -> bool:
    absent, of_call = vit.layout.absent, ("attn.scores", "attn.pattern", "attn.z")
    stream, *sites, output = (Site(layer, name) for name in BLOCK_SITES if name not in of_call)
    inner = Site(layer, "attn.z")
    inner = inner if str(inner) not in absent else Site(layer, "attn_out")
    if {str(stream), str(inner), str(output)} & set(absent):
        return False

    def changed(value: Tensor, seed: int) -> Tensor:
        pair = random_streams(2, value, seed)
        pair[1, 1::2] = pair[0, 1::2]
        return pair

    replaced: dict[Site, Visitor] = {stream: partial(changed, seed=0), inner: partial(changed, seed=1)}
    values = forward(vit, replaced, _all_but(vit, layer), 2, [str(site) for site in (*sites, output)])
    if values is None:
        return False
    stay = not any(moved(vit, own[:, 1::2])[1] for name, own in values.items() if name != "output")
    return stay and bool(moved(vit, values[str(output)][:, ::2])[1])


def _adds_up(vit: HookedViT, layer: int) -> bool:
    sites = [Site(layer, name) for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    names = list(map(str, sites))
    if set(names) & set(vit.layout.absent):
        return False
    values = forward(vit, {sites[0]: lambda x: random_streams(2, x)}, _all_but(vit, layer), 2, names)
    if values is None:
        return False
    *parts, whole = (values[name] for name in names)
    return bool((sum(parts) - whole).abs().max() <= 2e-6 * whole.abs().max())


def _all_but(vit: HookedViT, layer: int) -> list[int]:
    return [other for other in range(vit.layout.n_layers) if other != layer]


def _blocks(vit: HookedViT, what: str, holds: Callable[[HookedViT, int], bool]) -> frozenset[int]:
    """Blocks of which something holds, each tried once for its parts and weights."""

    def is_one(layer: int) -> bool:
        block: nn.Module = lookup(vit.module, vit.layout.block_path(layer))
        return remembered(vit, block, what, lambda: bool(attempted(vit, lambda vit: holds(vit, layer))))

    return tried(vit, lambda vit: frozenset(filter(is_one, range(vit.layout.n_layers)))) or frozenset()
