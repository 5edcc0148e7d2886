"""Where rows end whose output nobody wants: at the last place at which something of them is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.binding.joins import Join
from vit_mechinterp.engine.binding.stop import Stop
from vit_mechinterp.engine.rows.copies import Copies
from vit_mechinterp.engine.rows.numbering import Part

__all__ = ["ending", "ending_together", "ends_of"]

_NOWHERE = Join(0, False)
"""Stands for all places at which rows join that go on from no others."""


def ends_of(bound: Bound, copies: Iterable[Copies]) -> Mapping[str, Stop]:
    """Where rows of runs without output end, by run; what is read of ``copies`` is read of the rows that they
    are."""
    if len(bound.with_output) == len(bound.runs):
        return {}
    own = [run for run in bound.runs if not run.has_output]
    reads = {run.name: [read.site for read in bound.reads_of[run.name]] for run in own}
    for same in copies:
        if same.owner in reads:  # and so has no output for the copy either
            reads[same.owner] += reads[same.run]
    return {
        run.name: max(Stop.for_site(site, run.blocks.n) for site in reads[run.name])
        for run in own
        if reads[run.name]
    }


def ending(parts: Sequence[Part], ends: Mapping[str, Stop]) -> list[Part]:
    """Rows that end where they may."""
    return [
        replace(part, run=replace(part.run, ends=ends[part.run.name])) if part.run.name in ends else part
        for part in parts
    ]


def ending_together(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Rows that end at one place; those that others go on from come before these, which join later."""
    if len({part.run.ends for part in parts}) < 2:
        yield list(parts)
        return

    def order(part: Part) -> tuple[bool, Join, Stop]:
        run = part.run
        goes_on = run.beginning is not None
        return goes_on, run.join if goes_on else _NOWHERE, run.ends or Stop.at_end(run.blocks.n)

    for _, own in groupby(sorted(parts, key=order), key=order):
        yield list(own)
