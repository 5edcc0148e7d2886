"""What has to be computed, in which order: what the plan counts and the engine carries out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import Bound, BoundRun
from vit_mechinterp.engine.binding.values import Needs, Read
from vit_mechinterp.engine.reduction.unread import looks_inside, tokens_wanted
from vit_mechinterp.engine.rows.computed import ComputedRows
from vit_mechinterp.engine.rows.ending import ending_together
from vit_mechinterp.engine.rows.numbering import Part
from vit_mechinterp.engine.rows.order import Segment, in_waves
from vit_mechinterp.engine.rows.sharing import Sharing
from vit_mechinterp.engine.scheduling.clean_groups import CleanGroup, clean_groups
from vit_mechinterp.engine.scheduling.clean_needs import CleanNeeds
from vit_mechinterp.engine.scheduling.clean_reads import CleanReads
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
        return self.needs.chunks

    @property
    def reads(self) -> CleanReads:
        """What is read of clean forwards in all."""
        return self.sharing.once(("reads",), lambda: CleanReads(self.sharing))

    @property
    def needs(self) -> CleanNeeds:
        """What the chunks need of clean forwards."""
        return self.sharing.once(("needs", self.chunk), lambda: CleanNeeds(self.reads, self.chunk))

    @property
    def rows(self) -> ComputedRows:
        """The rows that are computed, chunk by chunk."""
        return self.needs.rows

    @cached_property
    def states_handed_on(self) -> int:
        """Values of the residual stream that the rows of a chunk hand on to others at most, per example."""
        if all(len(part.states) < 2 for own in self.sharing.parts.values() for part in own):
            return 0
        chunks = self.chunks[:1] if self.reads.is_regular else self.chunks
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
        return sum(len(s.examples) * s.run.passes for s in segments)

    def own_needs(self, chunk: range, reads: Sequence[Read] | None = None) -> Needs:
        """What a chunk's own clean forwards are for, beside those that it has in common with others."""
        needs = self.needs.of(chunk, reads)
        return self.needs.common.without(needs) if self.holds and reads is None else needs

    @property
    def common_batches(self) -> list[CleanGroup]:
        """The clean forwards that several chunks have in common."""
        return self.sharing.once(
            ("common batches", self.chunk, self.clean_width),
            lambda: list(self.clean_batches(self.needs.common.needs)),
        )

    @property
    def common_batch_of(self) -> IntArray:
        """The number of every image's forward among them, ``[image]``."""

        def find() -> IntArray:
            numbers = np.zeros(len(self.needs.common.is_common), dtype=np.int64)
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
