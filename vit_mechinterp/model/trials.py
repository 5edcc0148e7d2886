"""Trials: what a model does is found out by a forward on random values, not declared.

An experiment asks for them at every plan. Whatever goes wrong in one is taken for no answer, so that more is
computed, and nothing is wrong.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vit_mechinterp.model.as_made import is_as_made
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Instrument, Visitor
from vit_mechinterp.model.narrowing import Narrowing
from vit_mechinterp.spec import Site

__all__ = ["attempted", "forward", "moved", "random_streams", "remembered", "tried"]

Found = TypeVar("Found")

_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[object, Any]]] = weakref.WeakKeyDictionary()
"""By block and by what was tried: the state that the block was in, and what came out."""

logger = logging.getLogger(__name__)


def tried(vit: HookedViT, found: Callable[[HookedViT], Found | None], *sites: str) -> Found | None:
    """What is found out about a model that is as its library made it, and has some sites of the last block
    beside its output; None where it is not, has not, or trying failed."""
    last = vit.layout.n_layers - 1
    absent = {f"blocks.{last}.{name}" for name in (*sites, "resid_post")} & set(vit.layout.absent)
    if absent or next(vit.module.parameters()).is_meta:
        return None
    with vit.lock, torch.no_grad():
        return attempted(vit, found) if is_as_made(vit.module) else None


def remembered(
    vit: HookedViT, block: nn.Module, what: str, find: Callable[[], Found], *more: object
) -> Found:
    """What was found out about a block, found anew where its parts, its weights, its precision or something
    more that it depends on is another."""
    known, state = _KNOWN.setdefault(block, {}), (more, _state_of(vit, block))
    if what not in known or known[what][0] != state:
        known[what] = state, find()
    found: Found = known[what][1]
    return found


def attempted(vit: HookedViT, found: Callable[[HookedViT], Found]) -> Found | None:
    """What is found; None where an error was."""
    try:
        return found(vit)
    except Exception as error:  # an experiment is not worse off for it: more is computed
        logger.debug("%s was not tried out: %s", type(vit.module).__name__, error)
        return None


def forward(
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


def random_streams(rows: int, like: Tensor, seed: int = 0) -> Tensor:
    """Streams that are the same at every call, ``[row, token, d_model]``."""
    draw = torch.randn(rows, *like.shape[1:], generator=torch.Generator().manual_seed(seed))
    return draw.to(like)


def moved(vit: HookedViT, values: Tensor) -> Tensor:
    """Rows that are not the first one's over again, ``[row]``."""
    # A row that nothing changed may still be rounded otherwise than its neighbour.
    precise = vit.dtype in (torch.float32, torch.float64)
    rounding = 4 * torch.finfo(torch.float32).eps * float(values.abs().max()) if precise else 0.0
    return ~((values - values[0]).abs().flatten(1).amax(1) <= rounding).cpu()


def _state_of(vit: HookedViT, block: nn.Module) -> tuple[object, ...]:
    """What a block computes: its precision, what it consists of, and its weights."""
    return vit.precision, *_parts_of(block), *_norms_of(block)


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
