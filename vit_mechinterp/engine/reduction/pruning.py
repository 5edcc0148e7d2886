"""Runs without what nobody would miss: interventions that reach nothing that is read, and replaced bases.

Where an intervention replaces all that is read of the residual stream, the run is its source's from there
on. So its rows are the source's own, if the source is an image or a run whose edits end there, or else start
blank at that place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from vit_mechinterp.engine.binding.alike import alike
from vit_mechinterp.engine.binding.bound import Bound, BoundRun, Edit
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.reduction.bypassing import bypassing
from vit_mechinterp.engine.reduction.postponing import where_none_stay
from vit_mechinterp.engine.reduction.reach import Kept, Reach
from vit_mechinterp.engine.reduction.rebasing import reading_clean_values, showing_clean_values, without_base
from vit_mechinterp.engine.reduction.spelling import Spelling

__all__ = ["pruned"]


def pruned(bound: Bound, reach: Reach, spelling: Spelling, *, postponing: bool) -> Bound:
    """The same runs without interventions that reach nothing that is read, and without replaced bases.

    With ``postponing``, interventions inside attention or MLP are made where they come out, if that is the
    same; without, those are named that could be.
    """
    pruning = _Pruning(bound, reach, spelling)
    pruning.spell()
    pruning.carry()
    pruning.leave_out()
    for _ in bound.runs:  # a round for each run that turns out to be read less, at most
        if not pruning.replace_bases():
            break
        pruning.leave_out()  # of what others were there for
    return pruning.result(pruning.postponed(), postponing=postponing)


class _Pruning:
    """One experiment on its way, and what is said of its runs."""

    def __init__(self, bound: Bound, reach: Reach, spelling: Spelling) -> None:
        self.bound, self.reach, self.spelling = bound, reach, spelling
        self._equal: Mapping[str, Sequence[BoundRun]] = {}
        """By run, all that make the same rows: what is read of one of them counts for all."""
        self._kept: dict[str, Kept] = {}
        self._readers: Mapping[str, Sequence[Read]] = {}
        """By run, what others read of its edited values."""
        self._declared = {run.name: {edit.where for edit in run.edits} for run in bound.runs}
        self._left_out: defaultdict[str, list[str]] = defaultdict(list)
        self._moved: defaultdict[str, list[str]] = defaultdict(list)
        self._instead: dict[str, str] = {}

    def spell(self) -> None:
        """Write interventions in one way, all but those that change nothing whatever they are given."""
        acting = {run.name: self._with_some(run, self.reach.acting(run)) for run in self.bound.runs}
        self.bound = self.spelling.of(self.bound.with_runs(acting))
        self._equal = alike(self.bound)

    def carry(self) -> None:
        """Make interventions behind the blocks that only carry them on."""
        carried = {
            run.name: self._with_moved(run, self.reach.carried(run, self._reads(run, self.bound.reads_of)))
            for run in self.bound.runs
        }
        self.bound = self.bound.with_runs(carried)

    def leave_out(self) -> None:
        """Leave out what reaches nothing that is read; the last readers come first."""
        kept = {run.name: Kept() for run in self.bound.runs}
        readers: defaultdict[str, list[Read]] = defaultdict(list)
        for run in (run for stage in reversed(self.bound.stages) for run in stage):
            to_end = any(own.has_output for own in self._equal.get(run.name, (run,)))
            kept[run.name] = self.reach.kept(run, self._reads(run, readers), to_end=to_end)
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
        runs = dict(self.bound.named)
        for name in (run.name for stage in self.bound.stages for run in stage):
            runs[name] = self._from_what_it_is(runs[name], runs)
        before, self.bound = self.bound, self.spelling.of(self.bound.with_runs(runs))
        return set(self.bound.run_reads) != set(before.run_reads)

    def _from_what_it_is(self, run: BoundRun, others: Mapping[str, BoundRun]) -> BoundRun:
        """A run from where it is an image or one of the others, if it is, with the edits that change that."""
        run = reading_clean_values(run, others, self.reach.whose)
        readers = self._others(run)
        if not self._kept[run.name].of_first and self.reach.is_rid_of_base(run, readers):
            run, instead = without_base(run, others, self._captured(run))
            if instead is not None:
                self._instead[run.name] = f"{run.name} is {instead}"
        changing: Mapping[int, Edit] = self.reach.changing(run, others)
        if not run.has_output and not readers and len(self._equal[run.name]) == 1:
            run, changing = showing_clean_values(run, self.reach.whose, changing)
        return self._with_some(run, changing)

    def postponed(self) -> Bound:
        """The runs with interventions inside attention or MLP made where they come out."""
        runs = self.bound.runs
        later = {run.name: self.reach.postponed(run, self._reads(run, self._readers)) for run in runs}
        return self.bound.with_runs(where_none_stay(self.bound, later))

    def result(self, postponed: Bound, *, postponing: bool) -> Bound:
        """The runs as they are, or ``postponed``, in one spelling, with what is said of them."""
        names = [run.name for run in self.bound.runs]
        pairs = zip(self.bound.runs, postponed.runs, strict=True)
        later = tuple(edit.where for old, new in pairs for edit in _new_in(new, old))
        moved = tuple(where for name in names for where in self._moved[name])
        made = self.spelling.of(postponed if postponing else self.bound)
        unread = partial(self.reach.unread, to_end=bool(made.with_output))
        return replace(
            bypassing(made, self.reach.adding_up, unread),
            left_out=tuple(where for name in names for where in self._left_out[name]),
            postponed=tuple(dict.fromkeys((*moved, *later) if postponing else moved)),
            not_postponed=() if postponing else tuple(dict.fromkeys(later)),
            without_base=tuple(self._instead[name] for name in names if name in self._instead),
        )

    def _reads(self, run: BoundRun, readers: Mapping[str, Sequence[Read]]) -> list[Read]:
        """What is captured of a run and its equals, and what ``readers`` read of them."""
        read_by_others = (read for own in self._equal.get(run.name, ()) for read in readers[own.name])
        return [*self._captured(run), *read_by_others]

    def _captured(self, run: BoundRun) -> Iterator[Read]:
        """What is captured of a run and its equals."""
        return (capture.read for own in self._equal.get(run.name, ()) for capture in own.captures)

    def _others(self, run: BoundRun) -> list[Read]:
        """What others read of a run and its equals."""
        return [read for own in self._equal.get(run.name, ()) for read in self._readers[own.name]]

    def _with_moved(self, run: BoundRun, edits: Iterable[Edit]) -> BoundRun:
        """A run with edits of which some stand elsewhere than before."""
        moved = run.with_edits(edits)
        self._moved[run.name] += (edit.where for edit in _new_in(moved, run))
        return moved

    def _with_some(self, run: BoundRun, edits: Mapping[int, Edit]) -> BoundRun:
        """A run with some of its edits, given by their places."""
        left = (edit.where for place, edit in enumerate(run.edits) if place not in edits)
        # What it goes on from another run with is that one's, which may make it for others.
        self._left_out[run.name] += (where for where in left if where in self._declared[run.name])
        return run.with_edits(edits.values())


def _new_in(run: BoundRun, before: BoundRun) -> Iterator[Edit]:
    """Edits of a run that it had not before."""
    if run is not before:
        yield from (edit for edit in run.edits if all(edit is not own for own in before.edits))
