"""Rows that are computed, chunk by chunk: those that are no copies, each from where it is by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.rows.branching import Branches, branches
from vit_mechinterp.engine.rows.copies import Copies, by_owner
from vit_mechinterp.engine.rows.ending import ending, ends_of
from vit_mechinterp.engine.rows.numbering import Part
from vit_mechinterp.engine.rows.sharing import Sharing
from vit_mechinterp.engine.rows.table import StageRows

__all__ = ["ComputedRows", "within"]


@dataclass(frozen=True)
class ChunkRows:
    """Rows of one chunk: which go on from others, and, stage by stage, which are copies of rows that are
    computed here or in earlier chunks."""

    branches: Branches
    copies: tuple[Sequence[Copies], ...]

    @property
    def parts(self) -> tuple[tuple[Part, ...], ...]:
        """Rows that are computed, stage by stage."""
        return self.branches.parts


@dataclass(frozen=True)
class ComputedRows:
    """The rows of an experiment in chunks of consecutive examples."""

    sharing: Sharing
    chunk: int

    def of(self, chunk: range) -> ChunkRows:
        """Rows of a chunk."""
        if chunk not in self._known:
            self._known.clear()  # one chunk is asked for again and again, and then the next
            bound, stages = self.sharing.bound, range(len(self.sharing.bound.stages))
            copies = tuple(self._copies(stage, chunk) for stage in stages)
            ends = ends_of(bound, chain.from_iterable(copies))
            own = [ending(self._computed(stage, chunk), ends) for stage in stages]
            owners = by_owner(chain.from_iterable(copies))
            self._known[chunk] = ChunkRows(branches(own, bound.reads_of, owners), copies)
        return self._known[chunk]

    @cached_property
    def _known(self) -> dict[range, ChunkRows]:
        return {}

    def before(self, chunk: range) -> set[int]:
        """Numbers of the earlier chunks whose outputs are those of rows of this one."""
        if not self.sharing.repeats or self.chunk >= self.sharing.n_examples:
            return set()
        return set().union(*(table.before(chunk) for table in self.tables))

    @cached_property
    def tables(self) -> tuple[StageRows, ...]:
        """All rows in arrays, stage by stage."""
        parts = self.sharing.parts_of_stages
        return tuple(StageRows(self.sharing, own, self.chunk, self._read_runs) for own in parts)

    def _copies(self, stage: int, chunk: range) -> list[Copies]:
        return self.tables[stage].copies(chunk) if self.sharing.repeats else []

    def _computed(self, stage: int, chunk: range) -> list[Part]:
        if self.sharing.repeats:
            return self.tables[stage].computed_parts(chunk)
        every = self.sharing.parts_of_stages[stage]
        if len(chunk) == self.sharing.n_examples:
            return list(every)
        parts = (part.of(within(part.examples, chunk)) for part in every)
        return [part for part in parts if len(part.examples)]

    @cached_property
    def _read_runs(self) -> frozenset[str]:
        """Names of the runs whose rows are computed in every chunk that holds one of them."""
        bound = self.sharing.bound
        if bound.readout is not None:  # whole outputs are gone with their chunk, and labels may differ
            return frozenset(run.name for run in bound.runs)
        without = (run.name for run in bound.runs if not run.has_output)
        return frozenset(name for name, reads in bound.reads_of.items() if reads).union(without)


def within(examples: IntArray, chunk: range) -> slice:
    """Where those of some ascending examples stand that lie in a chunk."""
    if len(examples) and int(examples[-1]) == len(examples) - 1:  # all there are up to the last
        return slice(chunk.start, chunk.stop)
    start, stop = np.searchsorted(examples, [chunk.start, chunk.stop])
    return slice(start, stop)
