"""Rows of a wave that are still equal in the block where they join, so that parts of it run once for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import ImagesOf
from vit_mechinterp.engine.rows.order import Segment, starts_late
from vit_mechinterp.model.sparing import PARTS, Distinct
from vit_mechinterp.spec import BLOCK_SITES, Site

__all__ = ["distinct_rows"]

SPARING_PAYS = 0.75
"""Parts of a block run on distinct rows where these are at most this share of all rows; the attention module
as a whole, where its input and output alone are copied, wherever they are fewer."""


def distinct_rows(
    segments: Sequence[Segment], images_of: Sequence[ImagesOf]
) -> dict[int, dict[str, Distinct]]:
    """By layer and part, the distinct rows where they are so few that it pays (see `SPARING_PAYS`).

    ``images_of`` gives numbers of the images that each segment's rows start from.
    """
    by_layer: dict[int, set[int]] = defaultdict(set)
    for n, segment in enumerate(segments):
        if starts_late(segment.run):
            by_layer[segment.run.join.first_block].add(n)
    found: dict[int, dict[str, Distinct]] = {}
    for layer, late in by_layer.items():
        inside = [n for n, segment in enumerate(segments) if segment.run.is_inside(layer)]
        joining = [place for place, n in enumerate(inside) if n in late]
        parts = _spared([segments[n] for n in inside], [images_of[n] for n in inside], joining)
        if parts:
            found[layer] = parts
    return found


def _spared(
    segments: Sequence[Segment], images_of: Sequence[ImagesOf], late: Sequence[int]
) -> dict[str, Distinct]:
    """The distinct rows of every part of a block where it pays, if some segments join at the block."""
    rows = sum(len(segment.examples) for segment in segments)
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], Distinct] = {}
    parts: dict[str, Distinct] = {}
    for part in reversed(PARTS):
        free = tuple(n for n in late if _is_behind(segments[n].run.known_at, part))
        equal = tuple(n for n in late if _is_behind(segments[n].run.first, part))
        if (equal, free) not in known:
            known[equal, free] = _distinct(segments, images_of, equal, free)
        own = known[equal, free]
        whole = part == "attn_out" or parts.get("attn_out") is own
        if len(own.first) <= (rows - 1 if whole and part != "ln1" else SPARING_PAYS * rows):
            parts[part] = own
    return parts


def _distinct(
    segments: Sequence[Segment], images_of: Sequence[ImagesOf], equal: Sequence[int], free: Sequence[int]
) -> Distinct:
    """The rows of some segments that differ, where those of ``equal`` ones hold what they started from, and
    those of ``free`` ones may hold anything."""
    starts = np.cumsum([0, *(len(segment.examples) for segment in segments)])
    rows = int(starts[-1])
    keys, is_free = -1 - np.arange(rows), np.zeros(rows, dtype=np.bool_)
    for n in equal:
        keys[starts[n] : starts[n + 1]] = _starts_from(segments[n], images_of[n], below=-1 - rows)
    for n in free:
        is_free[starts[n] : starts[n + 1]] = True
    told = np.arange(1) if is_free.all() else np.flatnonzero(~is_free)
    _, first, which = np.unique(keys[told], return_index=True, return_inverse=True)
    index = np.zeros(rows, dtype=np.int64)
    index[told] = which.reshape(-1)
    return Distinct(told[first], index, is_free)


def _starts_from(segment: Segment, images_of: ImagesOf, below: int) -> IntArray:
    """Numbers by which rows that join with the same values are told: images, or some from ``below`` downwards
    for blank ones, which are equal to each other, and for those that go on from others."""
    run, examples = segment.run, segment.examples
    if segment.begins:
        return below - 1 - np.array(segment.begins)
    return np.full(len(examples), below) if run.blank else images_of(run.origin)[list(examples)]


def _is_behind(site: Site | None, part: str) -> bool:
    """Whether a site of the block that a row joins at comes behind one of the block's parts."""
    return site is not None and BLOCK_SITES.index(site.name) >= BLOCK_SITES.index(part)
