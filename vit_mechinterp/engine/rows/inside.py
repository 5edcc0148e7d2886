"""Runs whose rows start from clean values inside a block, where clean forwards pass through it anyway.

Where none does, rows pass the whole block, and what is captured before their first edit is read off them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from vit_mechinterp.engine.binding.bound import Bound, BoundRun
from vit_mechinterp.engine.binding.stop import Stop
from vit_mechinterp.engine.binding.values import ColumnOrigin
from vit_mechinterp.engine.rows.order import starts_late

__all__ = ["starting_inside"]


def starting_inside(bound: Bound) -> Bound:
    """The same runs; those that are first edited late in a block know how far their bases' forwards go."""
    if not any(starts_late(run) for run in bound.runs if run.edits):
        return bound
    clean_to: defaultdict[ColumnOrigin, int] = defaultdict(int)
    for run in bound.runs:
        for origin, blocks in _passed(run):
            clean_to[origin] = max(blocks, clean_to[origin])

    # Rows of several bases may be equal, and then one of them is computed and read for all.
    read_off = {layer for run in bound.runs for layer in _read_off(run) if layer >= clean_to[run.origin]}

    def knowing(run: BoundRun) -> BoundRun:
        late = run.edits and starts_late(run) and run.join.first_block not in read_off
        return replace(run, clean_to=clean_to[run.origin]) if late else run

    known = {run.name: knowing(run) for run in bound.runs}
    stages = tuple(tuple(known[run.name] for run in stage) for stage in bound.stages)
    return replace(bound, runs=tuple(known.values()), stages=stages)


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


def _read_off(run: BoundRun) -> Iterator[int]:
    """The blocks in which a run's rows may show what is captured before their first edit."""
    for capture in run.captures:
        if run.is_clean_at(capture.read.site) and run.holds(capture.read):
            yield run.join.first_block
