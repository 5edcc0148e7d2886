"""What has to be computed, in which order: what the plan counts and the engine carries out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vit_mechinterp.engine.arrays import NONE, IntArray
from vit_mechinterp.engine.binding.bound import Bound, BoundRun
from vit_mechinterp.engine.binding.values import ColumnOrigin, Need, Needs, Read
from vit_mechinterp.engine.reduction.unread import looks_inside, tokens_wanted
from vit_mechinterp.engine.rows.computed import ComputedRows, within
from vit_mechinterp.engine.rows.ending import ending_together
from vit_mechinterp.engine.rows.numbering import Part
from vit_mechinterp.engine.rows.order import Segment, in_waves
from vit_mechinterp.engine.rows.sharing import Sharing
from vit_mechinterp.engine.scheduling.clean_groups import CleanGroup, clean_groups
from vit_mechinterp.engine.scheduling.common import Common
from vit_mechinterp.engine.scheduling.reads import (
    ReadGroups,
    all_of,
    clean_read,
    clean_sources,
    wanted_by_rows,
    wanted_by_runs,
)
from vit_mechinterp.model.output_tokens import OutputTokens

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """All the work of one experiment, in chunks, each in clean forwards and waves.

    Args:
        sharing: the bound runs, and which of their rows are equal or clean.
        n_layers: number of blocks of the model.
        chunk: examples per chunk.
        width: most rows in one forward.
        one_image: why the model takes one image per forward, or None (see `Family`). Rows that join behind
            its embeddings are not limited by it.
        spares: whether parts of a joining block run once for rows that are still equal there.
        by_output: the tokens that the output reads of the last block, if these are not all.
        holds: whether what several chunks need of clean forwards is computed once, and held.
    """

    sharing: Sharing
    n_layers: int
    chunk: int
    width: int
    one_image: str | None = None
    spares: bool = False
    by_output: OutputTokens | None = None
    holds: bool = False

    @property
    def bound(self) -> Bound:
        """The bound runs."""
        return self.sharing.bound

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return self.sharing.n_examples

    @property
    def clean_width(self) -> int:
        """Most rows in one clean forward."""
        return self.width if self.one_image is None else 1

    @property
    def chunks(self) -> list[range]:
        """Consecutive ranges of examples."""
        return [range(i, min(i + self.chunk, self.n_examples)) for i in range(0, self.n_examples, self.chunk)]

    @cached_property
    def mean_reads(self) -> tuple[Read, ...]:
        """Reads to be averaged over the dataset."""
        parts = (part for parts in self.sharing.parts.values() for part in parts)
        means = (edit.mean for part in parts for edit in part.run.edits)
        return tuple(dict.fromkeys(m for m in means if m is not None))

    @property
    def means_come_first(self) -> bool:
        """Whether dataset means are computed before the chunks, because the dataset spans several."""
        return bool(self.mean_reads) and self.chunk < self.n_examples

    def is_kept(self, read: Read) -> bool:
        """Whether a clean value is a result, or stands in for a run's, so that it is wanted to the end."""
        return read in self._kept

    @cached_property
    def _kept(self) -> frozenset[Read]:
        runs = self.bound.runs
        return frozenset(clean_read(run, read) for run in runs for read in self.bound.reads_of[run.name])

    def is_for_means_alone(self, need: Need) -> bool:
        """Whether a clean value is averaged over the dataset, and read by nobody else."""
        return need in self.mean_reads and need not in self.last_stage and need not in self._kept

    @cached_property
    def rows(self) -> ComputedRows:
        """The rows that are computed, chunk by chunk."""
        return self.sharing.once(("rows", self.chunk), lambda: ComputedRows(self.sharing, self.chunk))

    @cached_property
    def is_regular(self) -> bool:
        """Whether chunks of one length compute the same, so that one of them need be looked at."""
        sharing = self.sharing
        parts = [part for own in sharing.parts.values() for part in own]
        if sharing.repeats or len(parts) > len(sharing.parts):
            return False
        if any(len(part.examples) < sharing.n_examples or part.run.blank for part in parts):
            return False
        reads = (*(read for read, _ in self._always_wanted), *self.mean_reads)
        origins = {*(read.origin for read in reads), *self._clean_outputs(range(1))}
        if any(isinstance(origin, ColumnOrigin) and origin.permutation is not None for origin in origins):
            return False
        images = np.concatenate(list(sharing.images.values()))
        return len(np.unique(images)) == len(images)

    @cached_property
    def states_handed_on(self) -> int:
        """Values of the residual stream that the rows of a chunk hand on to others at most, per example."""
        if all(len(part.states) < 2 for own in self.sharing.parts.values() for part in own):
            return 0
        chunks = self.chunks[:1] if self.is_regular else self.chunks
        return max(-(-self.rows.of(chunk).branches.n_states // len(chunk)) for chunk in chunks)

    def waves(self, parts: Sequence[Part]) -> Iterator[list[Segment]]:
        """Rows that fit into one growing batch and end together, in the order in which they join."""
        for together in ending_together(parts):
            yield from in_waves(together, self.width, spares=self.spares)

    def tokens_wanted(self, stage: int) -> tuple[int, ...] | None:
        """Tokens that somebody reads behind the last attention call, of rows of one stage; None for all."""
        return self.sharing.once(
            ("tokens", stage), lambda: tokens_wanted(self.by_output, self._read_of(stage))
        )

    def unread(self, stage: int) -> float:
        """The part of the last block that each row of a stage is spared, because nobody reads it. (A little
        more, where scores or pattern of that block are looked at in some waves and not in others.)"""
        tokens = self.tokens_wanted(stage)
        if tokens is None or self.by_output is None:
            return 0.0
        attention_whole = self.sharing.once(("inside", stage), lambda: looks_inside(self._read_of(stage)))
        return self.by_output.saved(tokens, attention_whole=attention_whole)

    def _read_of(self, stage: int) -> list[tuple[BoundRun, Sequence[Read]]]:
        parts = self.sharing.parts_of_stages[stage]
        return [(part.run, self.bound.reads_of[part.run.name]) for part in parts]

    def wave_blocks(self, segments: Sequence[Segment]) -> int:
        """(row, block) pairs of one wave."""
        return sum(len(s.examples) * (s.run.end - s.run.join.first_block) for s in segments)

    def clean_needs(self, chunk: range, reads: Sequence[Read] | None = None) -> Needs:
        """What a chunk needs of clean forwards; or only some reads, for all of its examples."""
        if reads is not None:
            return dict.fromkeys(reads, np.arange(chunk.start, chunk.stop))
        needs: dict[Need, IntArray] = {}
        needs.update(self.clean_values(chunk).items())
        needs.update(self._clean_outputs(chunk).items())
        return needs

    def clean_values(self, chunk: range) -> dict[Read, IntArray]:
        """The clean values among them."""
        everyone = np.arange(chunk.start, chunk.stop)
        wanted: dict[Read, list[IntArray]] = {}

        def want(read: Read, examples: IntArray) -> None:
            if len(examples):
                wanted.setdefault(read, []).append(everyone if len(examples) == len(everyone) else examples)

        repeating = zip(self.rows.tables, self._reads_of_parts, strict=True) if self.sharing.repeats else ()
        for table, groups in repeating:
            rows = table.computed(chunk)
            pairs = np.unique(groups.of[table.part_of[rows]] * self.n_examples + table.examples[rows])
            group_of, examples = np.divmod(pairs, self.n_examples)
            of_groups, starts = np.unique(group_of, return_index=True)
            for group, own in zip(of_groups.tolist(), np.split(examples, starts[1:]), strict=False):
                for read in groups.reads[group]:
                    want(read, own)
        for read, some in self._always_wanted:
            want(read, some[within(some, chunk)])
        if not self.means_come_first:
            for read in self.mean_reads:
                want(read, everyone)
        return {read: all_of(examples, everyone) for read, examples in wanted.items()}

    @property
    def _always_wanted(self) -> list[tuple[Read, IntArray]]:
        """Reads with their examples, apart from those of rows that may be equal to others."""

        def find() -> list[tuple[Read, IntArray]]:
            stages = () if self.sharing.repeats else self.sharing.parts_of_stages
            parts = [part for own in stages for part in own]
            by_rows = wanted_by_rows(parts, self.n_examples)
            return [*by_rows.items(), *wanted_by_runs(self.sharing).items()]

        return self.sharing.once(("wanted",), find)

    @property
    def _reads_of_parts(self) -> list[ReadGroups]:
        """Parts of every stage by what their rows read."""
        stages = self.sharing.parts_of_stages
        return self.sharing.once(("reads",), lambda: [ReadGroups.of_parts(own) for own in stages])

    def clean_rows(self, run: str, chunk: range) -> IntArray:
        """Examples of a chunk whose row of a run a clean forward answers."""
        if run not in self._partly_clean:
            return NONE
        own = self.sharing.classes[run][chunk.start : chunk.stop]
        found: IntArray = chunk.start + np.flatnonzero(own < 0)
        return found

    @cached_property
    def _partly_clean(self) -> frozenset[str]:
        names = (run.name for run in self.bound.runs)
        return frozenset(name for name in names if len(self.sharing.clean_rows(name)))

    def _clean_outputs(self, chunk: range) -> dict[ColumnOrigin, IntArray]:
        wanted: dict[ColumnOrigin, list[IntArray]] = {}
        for run in (run for run in self.bound.runs if run.has_output and run.name in self._partly_clean):
            examples = self.clean_rows(run.name, chunk)
            if len(examples):
                wanted.setdefault(run.origin, []).append(examples)
        everyone = np.arange(chunk.start, chunk.stop)
        return {origin: all_of(examples, everyone) for origin, examples in wanted.items()}

    def own_needs(self, chunk: range, reads: Sequence[Read] | None = None) -> Needs:
        """What a chunk's own clean forwards are for, beside those that it has in common with others."""
        needs = self.clean_needs(chunk, reads)
        return self.common.without(needs) if self.holds and reads is None else needs

    @property
    def common(self) -> Common:
        """What several chunks need of clean forwards, and what dataset means are made of."""

        def find() -> Common:
            if self.is_regular and not self.mean_reads:  # every image is in one chunk
                return Common(self.sharing)
            return Common.of(self.sharing, map(self.clean_needs, self.chunks), self.mean_reads)

        return self.sharing.once(("common", self.chunk), find)

    @property
    def common_batches(self) -> list[CleanGroup]:
        """The clean forwards that several chunks have in common."""
        return self.sharing.once(
            ("common batches", self.chunk, self.clean_width),
            lambda: list(self.clean_batches(self.common.needs)),
        )

    @property
    def common_batch_of(self) -> IntArray:
        """The number of every image's forward among them, ``[image]``."""

        def find() -> IntArray:
            numbers = np.zeros(len(self.common.is_common), dtype=np.int64)
            for number, batch in enumerate(self.common_batches):
                numbers[batch.images] = number
            return numbers

        return self.sharing.once(("batch of image", self.chunk, self.clean_width), find)

    def clean_batches(self, needs: Needs) -> Iterator[CleanGroup]:
        """The clean forwards that give what is needed, each image in one of them."""
        for group in clean_groups(self.sharing, self.n_layers, needs):
            for start in range(0, len(group.images), self.clean_width):
                span = slice(start, start + self.clean_width)
                yield CleanGroup(group.stop, group.images[span], group.sources[span])

    def widest(self, chunk: range) -> int:
        """Most rows in one forward of a chunk, whatever fits into one."""
        batches = [*self.clean_batches(self.own_needs(chunk)), *(self.common_batches if self.holds else ())]
        clean = (len(batch.images) for batch in batches)
        rows = (sum(len(part.examples) for part in parts) for parts in self.rows.of(chunk).parts)
        return max((*clean, *(min(own, self.width) for own in rows)), default=1)

    @cached_property
    def last_stage(self) -> dict[Read, int]:
        """The last stage whose edits read a value; a value that edits never read is not in it."""
        last: dict[Read, int] = {}
        for n, stage in enumerate(self.bound.stages):
            for run in stage:
                for part in self.sharing.parts[run.name]:
                    reads = (read for edit in part.run.edits for read in edit.reads)
                    last.update(dict.fromkeys((*reads, *clean_sources(part.run)), n))
        return last
