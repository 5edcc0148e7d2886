"""All rows of one stage in arrays: which rows of a chunk are computed, and which are copies of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.rows.copies import Copies
from vit_mechinterp.engine.rows.numbering import Part
from vit_mechinterp.engine.rows.sharing import Sharing

__all__ = ["StageRows"]


@dataclass(frozen=True)
class StageRows:
    """Rows of some parts, part by part and example by example, in chunks of consecutive examples.

    Args:
        sharing: which rows are equal.
        parts: the parts.
        chunk: examples per chunk.
        read: names of the runs whose values somebody reads beside their outputs, or whose outputs are not
            kept; equal rows of other chunks are no use to them. Runs without output are among them.
    """

    sharing: Sharing
    parts: tuple[Part, ...]
    chunk: int
    read: frozenset[str]

    @cached_property
    def examples(self) -> IntArray:
        """Example of every row."""
        return np.concatenate([np.zeros(0, np.int64), *(part.examples for part in self.parts)])

    @cached_property
    def part_of(self) -> IntArray:
        """Part of every row."""
        return np.repeat(np.arange(len(self.parts)), [len(part.examples) for part in self.parts])

    @cached_property
    def owners(self) -> IntArray:
        """For every row, the row that is computed for it: the first equal one of its chunk, or, where only
        outputs are wanted of all equal rows of its chunk, the first equal one at all that has one."""
        rows = np.arange(len(self.examples))
        if not self.sharing.repeats or not self.parts:
            return rows
        classes = np.concatenate([self.sharing.classes[p.run.name][p.examples] for p in self.parts])
        n_chunks = 1 + self.sharing.n_examples // self.chunk
        keys = classes * n_chunks + self.examples // self.chunk
        groups, first, which = np.unique(keys, return_index=True, return_inverse=True)
        which = which.reshape(-1)
        read = np.array([part.run.name in self.read for part in self.parts])[self.part_of]
        is_read = np.bincount(which, weights=read, minlength=len(groups)) > 0
        has_output = np.array([part.run.has_output for part in self.parts])[self.part_of[first]]
        # Groups of one class follow one another, chunk by chunk.
        of_class = groups // n_chunks
        known, earliest = np.unique(of_class[has_output], return_index=True)
        owner = first.copy()
        owner[~is_read] = first[has_output][earliest[np.searchsorted(known, of_class[~is_read])]]
        found: IntArray = owner[which]
        return found

    @cached_property
    def _by_chunk(self) -> tuple[IntArray, IntArray]:
        """Rows chunk by chunk, and where each chunk's begin."""
        chunks = self.examples // self.chunk
        n_chunks = -(-self.sharing.n_examples // self.chunk)
        order = np.argsort(chunks, kind="stable")
        return order, np.searchsorted(chunks[order], np.arange(n_chunks + 1))

    def rows(self, chunk: range) -> IntArray:
        """Rows of a chunk, ascending."""
        order, starts = self._by_chunk
        number = chunk.start // self.chunk
        found: IntArray = order[starts[number] : starts[number + 1]]
        return found

    def computed(self, chunk: range) -> IntArray:
        """Rows of a chunk that are computed in it."""
        rows = self.rows(chunk)
        own: IntArray = rows[self.owners[rows] == rows]
        return own

    def computed_parts(self, chunk: range) -> list[Part]:
        """The same, part by part."""
        rows = self.computed(chunk)
        found = []
        for own in _split(rows, self.part_of[rows]):
            part = self.part_of[own[0]]
            found.append(self.parts[part].of(own - self._starts[part]))
        return found

    @cached_property
    def _starts(self) -> IntArray:
        """The first row of every part."""
        return np.cumsum([0, *(len(part.examples) for part in self.parts)])

    def copies(self, chunk: range) -> list[Copies]:
        """Rows of a chunk that are copies, by run and owning run."""
        rows = self.rows(chunk)
        rows = rows[self.owners[rows] != rows]
        pairs = self.part_of[rows] * len(self.parts) + self.part_of[self.owners[rows]]
        rows = rows[np.argsort(pairs, kind="stable")]
        owners = self.owners[rows]
        pairs = self.part_of[rows] * len(self.parts) + self.part_of[owners]
        return [
            Copies(
                self.parts[self.part_of[own[0]]].run.name,
                self.examples[own],
                self.parts[self.part_of[self.owners[own[0]]]].run.name,
                self.examples[self.owners[own]],
            )
            for own in _split(rows, pairs)
        ]

    def before(self, chunk: range) -> set[int]:
        """Numbers of the earlier chunks that hold owners of a chunk's rows."""
        owners = self.examples[self.owners[self.rows(chunk)]] // self.chunk
        return set(np.unique(owners).tolist()) - {chunk.start // self.chunk}


def _split(rows: IntArray, keys: IntArray) -> Sequence[IntArray]:
    """Rows in pieces of one key; equal keys stand together."""
    return np.split(rows, np.flatnonzero(np.diff(keys)) + 1) if len(rows) else []
