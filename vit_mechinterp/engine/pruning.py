"""Runs without what nobody would miss: interventions that reach nothing that is read, and replaced bases.

Where an intervention replaces all that is read of the residual stream, the run is its source's from there
on. So its rows are the source's own, if the source is an image or a run whose edits end there, or else start
blank at that place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vit_mechinterp.engine.bound import Bound, BoundRun, Edit
from vit_mechinterp.engine.reach import Kept, Reach
from vit_mechinterp.engine.rebasing import reading_clean_values, showing_clean_values, without_base
from vit_mechinterp.engine.spelling import Spelling
from vit_mechinterp.engine.values import Read

__all__ = ["pruned"]

Readers = Mapping[str, Sequence[Read]]
"""By run, what others read of its edited values."""


def pruned(bound: Bound, reach: Reach, spelling: Spelling, *, postponing: bool) -> Bound:
    """The same runs without interventions that reach nothing that is read, and without replaced bases.

    With ``postponing``, interventions inside attention or MLP are made where they come out, if that is the
    same.
    """
    carried = {run.name: reach.carried(run, bound.reads_of[run.name]) for run in bound.runs}
    moved = {run.name: _new(run.edits, carried[run.name]) for run in bound.runs}
    bound = bound.with_runs({run.name: run.with_edits(carried[run.name]) for run in bound.runs})
    reaching, readers = _reaching(bound, reach)
    left_out = {run.name: _left_out(run, reaching[run.name].edits) for run in bound.runs}
    runs = {run.name: run.with_edits(reaching[run.name].edits.values()) for run in bound.runs}
    # What is left of edits may be what others are.
    runs = {run.name: run for run in spelling.of(bound.with_runs(runs)).runs}
    in_order = [run.name for stage in bound.stages for run in stage]
    instead_of_base: dict[str, str] = {}
    for name in in_order:
        own = reading_clean_values(runs[name], runs, reach.whose)
        if not reaching[name].of_first and reach.is_rid_of_base(own, readers[name]):
            own, instead = without_base(own, runs)
            instead_of_base[name] = f"{name} is {instead}"
        changing: Mapping[int, Edit] = reach.changing(own, runs)
        if not own.has_output and not readers[name]:
            own, changing = showing_clean_values(own, reach.whose, changing)
        left_out[name] += _left_out(own, changing)
        runs[name] = own.with_edits(changing.values())
    for name in in_order if postponing else ():
        edits = reach.postponed(runs[name], readers[name])
        moved[name] += _new(runs[name].edits, edits)
        runs[name] = runs[name].with_edits(edits)
    return replace(
        spelling.of(bound.with_runs(runs)),
        left_out=tuple(where for run in bound.runs for where in left_out[run.name]),
        postponed=tuple(where for run in bound.runs for where in moved[run.name]),
        without_base=tuple(instead_of_base[run.name] for run in bound.runs if run.name in instead_of_base),
    )


def _new(edits: Sequence[Edit], moved: Sequence[Edit]) -> list[str]:
    """Where those edits stand that are others than before."""
    return [edit.where for edit in moved if all(edit is not own for own in edits)]


def _left_out(run: BoundRun, edits: Mapping[int, Edit]) -> list[str]:
    """Where those edits of a run stand that are not among some, given by their places."""
    return [edit.where for place, edit in enumerate(run.edits) if place not in edits]


def _reaching(bound: Bound, reach: Reach) -> tuple[dict[str, Kept], Readers]:
    """What reaches what is read, by run, and what others read of it: the last readers come first."""
    kept = {run.name: Kept() for run in bound.runs}
    readers: defaultdict[str, list[Read]] = defaultdict(list)
    for run in (run for stage in reversed(bound.stages) for run in stage):
        kept[run.name] = reach.kept(run, [*(capture.read for capture in run.captures), *readers[run.name]])
        for edit in kept[run.name].edits.values():
            if edit.source is not None and edit.source_run is not None:
                readers[edit.source_run].append(edit.source)
    return kept, readers
