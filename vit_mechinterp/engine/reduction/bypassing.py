"""Blocks that rows need not pass through: all that attention and MLP add to the stream is replaced.

What such a block puts out is its input and what is put in for the two, whatever they would have given. So
rows step aside before it, and are back behind it with what is put in added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vit_mechinterp.engine.binding.bound import Bound, BoundRun
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.spec import BLOCK_SITES, Site

__all__ = ["bypassing"]

Unread = Callable[[BoundRun, Sequence[Read]], frozenset[Site]]

_ATTENTION, _MLP = "attn_out", "mlp_out"
_INSIDE = frozenset(BLOCK_SITES) - {"resid_pre", _ATTENTION, "resid_mid", _MLP, "resid_post"}
"""Sites of a block at which rows that bypass it have no value."""


def bypassing(bound: Bound, adding_up: Callable[[], frozenset[int]], unread: Unread) -> Bound:
    """The same runs; each knows the blocks that its rows bypass.

    Args:
        bound: the bound runs, with their edits where they are made.
        adding_up: blocks that put out the sum of their input and of what attention and MLP add.
        unread: the sites of a run at which nothing is read of what its edits there are given, if all of
            some reads are of it.
    """
    replacing = {run.name: layers for run in bound.runs if (layers := _replaced(run))}
    if not replacing:
        return bound
    # Rows that are equal are computed once for all who read them, so what is read of one counts for all.
    found = {run.name: run for run in bound.runs}
    reads = [
        read
        for name in replacing
        for read in bound.reads_of[name]
        if not found[name].is_clean_at(read.site)  # or the clean forward gives it
    ]
    looked_into = {read.site.layer for read in reads if read.site.name in _INSIDE}
    for name, layers in replacing.items():
        run = found[name]
        if own := (layers & _open(run) & adding_up()) - looked_into:
            given = unread(run, reads)
            bypassed = frozenset(layer for layer in own if _increments(layer) <= given)
            found[name] = replace(run, bypasses=bypassed) if bypassed else run
    return bound.with_runs(found)


def _increments(layer: int) -> set[Site]:
    return {Site(layer, _ATTENTION), Site(layer, _MLP)}


def _replaced(run: BoundRun) -> frozenset[int]:
    """Blocks of which a run edits what attention adds, and what the MLP adds, and nothing inside of them."""
    sites = {edit.site for edit in run.edits}
    layers = frozenset(site.layer for site in sites if site.layer is not None and site.name == _ATTENTION)
    inside = {site.layer for site in sites if site.name in _INSIDE}
    return frozenset(layer for layer in layers - inside if _increments(layer) <= sites)


def _open(run: BoundRun) -> frozenset[int]:
    """Blocks before which rows can leave a growing batch, and behind which they can join it again."""
    blocks = run.blocks
    return frozenset(
        layer
        for layer in range(blocks.n)
        if layer not in blocks.through and not {layer - 1, layer} & blocks.closed
    )
