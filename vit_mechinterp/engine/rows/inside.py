"""Runs whose rows start from clean values inside a block, where clean forwards pass through it anyway.

Where none does, rows pass the whole block, and what is read before their first edit is read off them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from vit_mechinterp.engine.binding.bound import Bound, BoundRun
from vit_mechinterp.engine.binding.stop import Stop
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read
from vit_mechinterp.engine.rows.order import starts_late
from vit_mechinterp.engine.rows.sharing import acting

__all__ = ["starting_inside"]


def starting_inside(bound: Bound) -> Bound:
    """The same runs; those whose rows are first edited late in a block know how far clean forwards go."""
    own = {run.name: list(_variants(run)) for run in bound.runs if run.edits}
    if not any(starts_late(variant) for variants in own.values() for variant in variants):
        return bound
    clean_to: defaultdict[ColumnOrigin, int] = defaultdict(int)
    for run in bound.runs:
        for origin, blocks in _passed(run):
            clean_to[origin] = max(blocks, clean_to[origin])

    # Rows of several bases may be equal, and then one of them is computed and read for all.
    read_off = {
        layer
        for name, variants in own.items()
        for variant in variants
        for layer in _read_off(variant, bound.reads_of[name])
        if layer >= clean_to[variant.origin]
    }

    def knowing(run: BoundRun) -> BoundRun:
        late = [variant.join.first_block for variant in own.get(run.name, ()) if starts_late(variant)]
        return replace(run, clean_to=clean_to[run.origin]) if late and not read_off & {*late} else run

    known = {run.name: knowing(run) for run in bound.runs}
    stages = tuple(tuple(known[run.name] for run in stage) for stage in bound.stages)
    return replace(bound, runs=tuple(known.values()), stages=stages)


def _variants(run: BoundRun) -> Iterator[BoundRun]:
    """A run as its rows may be: in some examples, the first of its edits may do nothing."""
    yield run
    for place, edit in enumerate(run.edits[:-1], 1):
        if edit.source is None and not edit.idle:
            return
        yield acting(run, run.edits[place:])


def _passed(run: BoundRun) -> Iterator[tuple[ColumnOrigin, int]]:
    """How many blocks the clean forward of every example's base passes for a run, at least. (A chunk whose
    rows are copies of those of an earlier one may do without.)"""
    if not run.edits and run.has_output:
        yield run.origin, run.blocks.n
    elif run.edits and not run.blank:
        yield run.origin, Stop.for_site(run.join.site, run.blocks.n).blocks
    for capture in run.captures:
        if isinstance(capture.read.origin, ColumnOrigin) and not run.holds(capture.read):
            yield capture.read.origin, Stop.for_site(capture.read.site, run.blocks.n).blocks


def _read_off(run: BoundRun, reads: Iterable[Read]) -> Iterator[int]:
    """The blocks in which a run's rows may show what is read before their first edit."""
    for read in reads:
        if run.is_clean_at(read.site) and run.holds(read):
            yield run.join.first_block
