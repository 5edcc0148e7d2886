"""All clean values of an experiment that somebody reads, and who does, whatever its chunks are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import BoundRun
from vit_mechinterp.engine.binding.values import ColumnOrigin, Need, Read
from vit_mechinterp.engine.rows.sharing import Sharing
from vit_mechinterp.engine.scheduling.reads import (
    ReadGroups,
    clean_read,
    clean_sources,
    wanted_by_rows,
    wanted_by_runs,
)

__all__ = ["CleanReads"]


@dataclass(frozen=True)
class CleanReads:
    """What is read of clean forwards in all.

    Args:
        sharing: the bound runs, and which of their rows are equal or clean.
    """

    sharing: Sharing

    @cached_property
    def means(self) -> tuple[Read, ...]:
        """Values to be averaged over the dataset."""
        parts = (part for parts in self.sharing.parts.values() for part in parts)
        means = (edit.mean for part in parts for edit in part.run.edits)
        return tuple(dict.fromkeys(m for m in means if m is not None))

    @cached_property
    def kept(self) -> frozenset[Read]:
        """Values that are results, or stand in for a run's, so that they are wanted to the end."""
        bound = self.sharing.bound
        return frozenset(clean_read(run, read) for run in bound.runs for read in bound.reads_of[run.name])

    @cached_property
    def last_stage(self) -> dict[Read, int]:
        """The last stage whose edits read a value; a value that edits never read is not in it."""
        last: dict[Read, int] = {}
        for n, parts in enumerate(self.sharing.parts_of_stages):
            for part in parts:
                reads = (read for edit in part.run.edits for read in edit.reads)
                last.update(dict.fromkeys((*reads, *clean_sources(part.run)), n))
        return last

    def is_for_means_alone(self, need: Need) -> bool:
        """Whether a value is averaged over the dataset, and read by nobody else."""
        return need in self.means and need not in self.last_stage and need not in self.kept

    @cached_property
    def always(self) -> tuple[tuple[Read, IntArray], ...]:
        """Reads with their examples, apart from those of rows that may be equal to others."""
        stages = () if self.sharing.repeats else self.sharing.parts_of_stages
        parts = [part for own in stages for part in own]
        by_rows = wanted_by_rows(parts, self.sharing.n_examples)
        return (*by_rows.items(), *wanted_by_runs(self.sharing).items())

    @cached_property
    def of_parts(self) -> tuple[ReadGroups, ...]:
        """The parts of every stage by what their rows read."""
        return tuple(ReadGroups.of_parts(own) for own in self.sharing.parts_of_stages)

    @cached_property
    def by_chunks(self) -> frozenset[Read]:
        """All values that any chunk may read, but for dataset means."""
        groups = chain.from_iterable(own.reads for own in self.of_parts)
        return frozenset(chain(chain.from_iterable(groups), (read for read, _ in self.always)))

    @cached_property
    def partly_clean(self) -> dict[str, BoundRun]:
        """Runs, by name, whose output is wanted, and some of whose rows clean forwards answer."""
        runs = self.sharing.bound.with_output
        return {run.name: run for run in runs if len(self.sharing.clean_rows(run.name))}

    @cached_property
    def is_regular(self) -> bool:
        """Whether chunks of one length compute the same, so that one of them need be looked at."""
        sharing = self.sharing
        parts = [part for own in sharing.parts.values() for part in own]
        if sharing.repeats or len(parts) > len(sharing.parts):
            return False
        if any(len(part.examples) < sharing.n_examples or part.run.blank for part in parts):
            return False
        reads = (*(read for read, _ in self.always), *self.means)
        origins = {*(read.origin for read in reads), *(run.origin for run in self.partly_clean.values())}
        if any(isinstance(origin, ColumnOrigin) and origin.permutation is not None for origin in origins):
            return False
        images = np.concatenate(list(sharing.images.values()))
        return len(np.unique(images)) == len(images)
