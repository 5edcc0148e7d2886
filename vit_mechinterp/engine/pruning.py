"""Runs without what nobody would miss: interventions that reach nothing that is read, and replaced bases.

Where an intervention replaces all that is read of the residual stream, the run is its source's from there
on. So its rows are the source's own, if the source is an image or a run whose edits end there, or else start
blank at that place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vit_mechinterp.engine.bound import Bound, BoundRun, Edit
from vit_mechinterp.engine.reach import Kept, Reach
from vit_mechinterp.engine.rebasing import reading_clean_values, showing_clean_values, without_base
from vit_mechinterp.engine.spelling import Spelling
from vit_mechinterp.engine.values import Read

__all__ = ["pruned"]


def pruned(bound: Bound, reach: Reach, spelling: Spelling, *, postponing: bool) -> Bound:
    """The same runs without interventions that reach nothing that is read, and without replaced bases.

    With ``postponing``, interventions inside attention or MLP are made where they come out, if that is the
    same.
    """
    pruning = _Pruning(bound, reach, spelling)
    pruning.carry()
    pruning.leave_out()
    while pruning.replace_bases():  # what others were there for is left out as well
        pruning.leave_out()
    if postponing:
        pruning.postpone()
    return pruning.result()


class _Pruning:
    """One experiment on its way, and what is said of its runs."""

    def __init__(self, bound: Bound, reach: Reach, spelling: Spelling) -> None:
        self.bound, self.reach, self.spelling = bound, reach, spelling
        self._beside = _beside_outputs(bound)
        self._kept: dict[str, Kept] = {}
        self._readers: Mapping[str, Sequence[Read]] = {}
        """By run, what others read of its edited values."""
        self._left_out: defaultdict[str, list[str]] = defaultdict(list)
        self._moved: defaultdict[str, list[str]] = defaultdict(list)
        self._instead: dict[str, str] = {}

    def carry(self) -> None:
        """Make interventions behind the blocks that only carry them on."""
        carried = {
            run.name: self._with_moved(run, self.reach.carried(run, self.bound.reads_of[run.name]))
            for run in self.bound.runs
        }
        self.bound = self.bound.with_runs(carried)

    def leave_out(self) -> None:
        """Leave out what reaches nothing that is read; the last readers come first."""
        kept = {run.name: Kept() for run in self.bound.runs}
        readers: defaultdict[str, list[Read]] = defaultdict(list)
        for run in (run for stage in reversed(self.bound.stages) for run in stage):
            reads = [*(capture.read for capture in run.captures), *readers[run.name]]
            kept[run.name] = self.reach.kept(run, reads, to_end=run.has_output or run.name in self._beside)
            for edit in kept[run.name].edits.values():
                if edit.source is not None and edit.source_run is not None:
                    readers[edit.source_run].append(edit.source)
        self._kept, self._readers = kept, readers
        left = {run.name: self._with_some(run, kept[run.name].edits) for run in self.bound.runs}
        # What is left of edits may be what others are.
        self.bound = self.spelling.of(self.bound.with_runs(left))

    def replace_bases(self) -> bool:
        """Let runs begin with what replaces their bases, and leave out what is there already; whether some
        run is read less for it."""
        runs = {run.name: run for run in self.bound.runs}
        for name in [run.name for stage in self.bound.stages for run in stage]:
            own = reading_clean_values(runs[name], runs, self.reach.whose)
            if not self._kept[name].of_first and self.reach.is_rid_of_base(own, self._readers[name]):
                own, instead = without_base(own, runs)
                self._instead[name] = f"{name} is {instead}"
            changing: Mapping[int, Edit] = self.reach.changing(own, runs)
            if not own.has_output and name not in self._beside and not self._readers[name]:
                own, changing = showing_clean_values(own, self.reach.whose, changing)
            runs[name] = self._with_some(own, changing)
        before, self.bound = self.bound, self.bound.with_runs(runs)
        return set(self.bound.run_reads) != set(before.run_reads)

    def postpone(self) -> None:
        """Make interventions inside attention or MLP where they come out."""
        postponed = {
            run.name: self._with_moved(run, self.reach.postponed(run, self._readers[run.name]))
            for run in self.bound.runs
        }
        self.bound = self.bound.with_runs(postponed)

    def result(self) -> Bound:
        """The runs as they are, in one spelling, with what is said of them."""
        names = [run.name for run in self.bound.runs]
        return replace(
            self.spelling.of(self.bound),
            left_out=tuple(where for name in names for where in self._left_out[name]),
            postponed=tuple(where for name in names for where in self._moved[name]),
            without_base=tuple(self._instead[name] for name in names if name in self._instead),
        )

    def _with_moved(self, run: BoundRun, edits: Iterable[Edit]) -> BoundRun:
        """A run with edits of which some stand elsewhere than before."""
        moved = run.with_edits(edits)
        new = (edit for edit in moved.edits if all(edit is not own for own in run.edits))
        self._moved[run.name] += (edit.where for edit in new) if moved is not run else ()
        return moved

    def _with_some(self, run: BoundRun, edits: Mapping[int, Edit]) -> BoundRun:
        """A run with some of its edits, given by their places."""
        self._left_out[run.name] += (edit.where for place, edit in enumerate(run.edits) if place not in edits)
        return run.with_edits(edits.values())


def _beside_outputs(bound: Bound) -> frozenset[str]:
    """Runs without output that are equal to ones with it, off whose rows they are read."""
    if len(bound.with_output) == len(bound.runs):
        return frozenset()
    what = {run.name: run.run.model_dump_json(include={"base", "interventions"}) for run in bound.runs}
    going_on = {what[run.name] for run in bound.with_output}
    return frozenset(run.name for run in bound.runs if not run.has_output and what[run.name] in going_on)
