"""What chunks need of clean forwards: values, outputs, and what several of them have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vit_mechinterp.engine.arrays import NONE, IntArray
from vit_mechinterp.engine.binding.values import ColumnOrigin, Need, Needs, Read
from vit_mechinterp.engine.rows.computed import ComputedRows, within
from vit_mechinterp.engine.rows.sharing import Sharing
from vit_mechinterp.engine.scheduling.clean_reads import CleanReads
from vit_mechinterp.engine.scheduling.common import Common
from vit_mechinterp.engine.scheduling.reads import all_of

__all__ = ["CleanNeeds"]


@dataclass(frozen=True)
class CleanNeeds:
    """What chunks of consecutive examples need of clean forwards.

    Args:
        reads: what is read of clean forwards in all.
        chunk: examples per chunk.
    """

    reads: CleanReads
    chunk: int

    @property
    def sharing(self) -> Sharing:
        """Which rows are equal or clean."""
        return self.reads.sharing

    @property
    def chunks(self) -> list[range]:
        """Consecutive ranges of examples."""
        n = self.sharing.n_examples
        return [range(start, min(start + self.chunk, n)) for start in range(0, n, self.chunk)]

    @cached_property
    def rows(self) -> ComputedRows:
        """The rows that are computed, chunk by chunk."""
        return ComputedRows(self.sharing, self.chunk)

    @property
    def means_come_first(self) -> bool:
        """Whether dataset means are computed before the chunks, because the dataset spans several."""
        return bool(self.reads.means) and self.chunk < self.sharing.n_examples

    def of(self, chunk: range, reads: Sequence[Read] | None = None) -> Needs:
        """What a chunk needs, with the examples; or only some reads, for all of its examples."""
        if reads is not None:
            return dict.fromkeys(reads, np.arange(chunk.start, chunk.stop))
        needs: dict[Need, IntArray] = {}
        needs.update(self.values(chunk).items())
        needs.update(self.outputs(chunk).items())
        return needs

    def values(self, chunk: range) -> dict[Read, IntArray]:
        """The values among them."""
        everyone = np.arange(chunk.start, chunk.stop)
        wanted: dict[Read, list[IntArray]] = {}

        def want(read: Read, examples: IntArray) -> None:
            if len(examples):
                wanted.setdefault(read, []).append(everyone if len(examples) == len(everyone) else examples)

        n = self.sharing.n_examples
        repeating = zip(self.rows.tables, self.reads.of_parts, strict=True) if self.sharing.repeats else ()
        for table, groups in repeating:
            rows = table.computed(chunk)
            pairs = np.unique(groups.of[table.part_of[rows]] * n + table.examples[rows])
            group_of, examples = np.divmod(pairs, n)
            of_groups, starts = np.unique(group_of, return_index=True)
            for group, own in zip(of_groups.tolist(), np.split(examples, starts[1:]), strict=False):
                for read in groups.reads[group]:
                    want(read, own)
        for read, some in self.reads.always:
            want(read, some[within(some, chunk)])
        if not self.means_come_first:
            for read in self.reads.means:
                want(read, everyone)
        return {read: all_of(examples, everyone) for read, examples in wanted.items()}

    def outputs(self, chunk: range) -> dict[ColumnOrigin, IntArray]:
        """The outputs among them: those that answer rows that no edit changes."""
        wanted: dict[ColumnOrigin, list[IntArray]] = {}
        for name, run in self.reads.partly_clean.items():
            examples = self.clean_rows(name, chunk)
            if len(examples):
                wanted.setdefault(run.origin, []).append(examples)
        everyone = np.arange(chunk.start, chunk.stop)
        return {origin: all_of(examples, everyone) for origin, examples in wanted.items()}

    def clean_rows(self, run: str, chunk: range) -> IntArray:
        """Examples of a chunk whose row of a run a clean forward answers."""
        if run not in self.reads.partly_clean:
            return NONE
        own = self.sharing.classes[run][chunk.start : chunk.stop]
        found: IntArray = chunk.start + np.flatnonzero(own < 0)
        return found

    @cached_property
    def common(self) -> Common:
        """What several chunks need, and what dataset means are made of."""
        if self.reads.is_regular and not self.reads.means:  # every image is in one chunk
            return Common(self.sharing)
        return Common.of(self.sharing, map(self.of, self.chunks), self.reads.means)
