"""Tokens that nobody reads behind the last attention call, and that waves leave out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vit_mechinterp.engine.binding.bound import BoundRun
from vit_mechinterp.engine.binding.ops import acts_by_token
from vit_mechinterp.engine.binding.positions import Positions
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.reduction.anatomy import BEHIND_CALL
from vit_mechinterp.model.output_tokens import OutputTokens
from vit_mechinterp.spec import Site

__all__ = ["looks_inside", "tokens_wanted", "union"]

NARROWING_PAYS = 0.5
"""Tokens are left out where those that are read are at most this share of all."""


def tokens_wanted(
    by_output: OutputTokens | None, runs: Iterable[tuple[BoundRun, Sequence[Read]]]
) -> tuple[int, ...] | None:
    """Tokens that are read behind the last attention call: by the output, by what is captured of some runs
    or read by others, and by operators that may look at several tokens at once.

    Args:
        by_output: what the output reads; None for all tokens.
        runs: each with what is read of its rows.

    Returns:
        Positions, ascending; None where all tokens are computed.
    """
    if by_output is None:
        return None
    found = set(by_output.tokens)
    for positions in _positions(runs):
        if positions.is_all:
            return None
        for own in positions.each or (positions.shared or (),):
            found.update(own)
    return tuple(sorted(found)) if len(found) <= NARROWING_PAYS * by_output.n_tokens else None


def looks_inside(runs: Iterable[tuple[BoundRun, Sequence[Read]]]) -> bool:
    """Whether scores or pattern of the last block are read or edited: then its call is made in full."""

    def is_inside(site: Site, run: BoundRun) -> bool:
        return site.layer == run.blocks.n - 1 and site.name in ("attn.scores", "attn.pattern")

    return any(
        any(is_inside(edit.site, run) for edit in run.edits)
        or any(is_inside(read.site, run) and run.holds(read) for read in reads)
        for run, reads in runs
    )


def union(several: Iterable[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """All tokens that one of several readers reads; None where one of them reads all."""
    found: set[int] = set()
    for own in several:
        if own is None:
            return None
        found.update(own)
    return tuple(sorted(found))


def _positions(runs: Iterable[tuple[BoundRun, Sequence[Read]]]) -> Iterator[Positions]:
    for run, reads in runs:
        for read in reads:
            if _is_behind(read.site, run) and run.holds(read):
                yield read.positions
        for edit in run.edits:
            if _is_behind(edit.site, run) and not acts_by_token(edit.spec):
                yield edit.positions


def _is_behind(site: Site, run: BoundRun) -> bool:
    if site.layer is None:
        return site.name == "ln_final"
    return site.layer == run.blocks.n - 1 and site.name in BEHIND_CALL
