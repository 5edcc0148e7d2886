"""Rows that go on from what other rows have been through, where both begin with the same edits.

Rows are one as long as their images and the edits made so far are equal. Of all rows that are in one state in
a block, one passes through it; the others begin behind the last block of which that is true, each with a copy
of that row's residual stream.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vit_mechinterp.engine.bound import Beginning
from vit_mechinterp.engine.numbering import Part
from vit_mechinterp.engine.positions import IntArray
from vit_mechinterp.engine.values import Read
from vit_mechinterp.spec import Site

__all__ = ["Branches", "Handed", "branches"]

Row = tuple[str, int]
"""A run's name, and an example."""


@dataclass(frozen=True)
class Handed:
    """What a row hands to another one that goes on from it: all that is read of that other row from ``since``
    on and before ``until``."""

    row: Row
    since: Site
    until: Site


@dataclass(frozen=True)
class Branches:
    """Rows of one chunk, stage by stage, each from where it goes on by itself.

    ``gifts`` are the states that a row hands on, each with the site that it is seen at; ``handed`` is what
    is read of others while they are still one with it.
    """

    parts: tuple[tuple[Part, ...], ...]
    gifts: Mapping[Row, Mapping[tuple[Site, int], None]] = field(default_factory=dict)
    handed: Mapping[Row, Sequence[Handed]] = field(default_factory=dict)


def branches(
    stages: Sequence[Sequence[Part]],
    n_layers: int,
    reads_of: Mapping[str, Sequence[Read]],
    copies: Mapping[Row, Sequence[Row]],
) -> Branches:
    """Find where every row of a chunk goes on by itself.

    Args:
        stages: rows that are computed, all of them different.
        n_layers: number of blocks.
        reads_of: what is read of every run.
        copies: rows that are equal to one that is computed, by that one.
    """
    known = _Together.of(stages, n_layers)
    if known is None:
        return Branches(tuple(map(tuple, stages)))
    gifts: defaultdict[Row, dict[tuple[Site, int], None]] = defaultdict(dict)
    found: defaultdict[int, list[tuple[Beginning, IntArray]]] = defaultdict(list)
    for part, beginning, rows in known.beginnings():
        found[part].append((beginning, rows))
        states = known.parts[part].states[beginning.made - 1][rows - known.starts[part]]
        for row, state in zip(known.providers[rows].tolist(), states.tolist(), strict=True):
            gifts[known.row(row)].update(((site, state), None) for site in beginning.sites)
    own_from = [part.run.own_from for part in known.parts]
    handed = _handed(known, found, own_from, reads_of, copies)
    split = iter(_split(known, found))
    parts = tuple(tuple(own for _ in stage for own in next(split)) for stage in stages)
    return Branches(parts, gifts, handed)


@dataclass(frozen=True)
class _Together:
    """Rows in arrays: of which part each is, from which block on it is by itself, and which row passes
    through the block before that for it."""

    parts: Sequence[Part]
    n_layers: int
    starts: IntArray
    part_of: IntArray
    alone_from: IntArray
    providers: IntArray

    @classmethod
    def of(cls, stages: Sequence[Sequence[Part]], n_layers: int) -> _Together | None:
        """Those of a chunk; None where each row is by itself from its first edit on."""
        parts = [part for stage in stages for part in stage]
        if all(len(part.states) < 2 for part in parts):
            return None
        first = np.concatenate([part.states[0] for part in parts])
        if len(np.unique(first)) == len(first):
            return None
        starts = np.cumsum([0, *(len(part.examples) for part in parts)])
        n = len(first)
        states = np.full((n_layers, n), -1, dtype=np.int64)
        joins = np.empty(n, dtype=np.int64)
        for number, part in enumerate(parts):
            own, blocks = slice(starts[number], starts[number + 1]), part.run.first_blocks(n_layers)
            joins[own] = blocks[0]
            for state, since, until in zip(part.states, blocks, [*blocks[1:], n_layers], strict=True):
                states[since:until, own] = state
        last = np.repeat(np.arange(len(stages)), [sum(len(p.examples) for p in own) for own in stages])
        through = np.tile(np.arange(n), (n_layers, 1))
        for layer, of_block in enumerate(states):
            there = np.flatnonzero(of_block >= 0)
            if layer == n_layers - 1:  # whose tokens are not the same in every stage
                of_block = of_block * len(stages) + last
            # The first in order passes, here and so in every later block that it is in.
            _, firsts, which = np.unique(of_block[there], return_index=True, return_inverse=True)
            through[layer, there] = there[firsts[which.reshape(-1)]]
        passes = (through == np.arange(n)) & (states >= 0)
        alone_from = np.where(passes.any(axis=0), passes.argmax(axis=0), n_layers)
        may_join = np.array([parts[0].run.last_open(block) for block in range(n_layers + 1)])
        alone_from = np.maximum(joins, may_join[alone_from])
        begins = alone_from > joins
        providers = np.where(begins, through[np.maximum(alone_from - 1, 0), np.arange(n)], np.arange(n))
        part_of = np.repeat(np.arange(len(parts)), np.diff(starts))
        return cls(parts, n_layers, starts, part_of, alone_from, providers)

    def row(self, row: int) -> Row:
        """Run and example of a row."""
        part = int(self.part_of[row])
        return self.parts[part].run.name, int(self.parts[part].examples[row - self.starts[part]])

    def beginnings(self) -> Iterator[tuple[int, Beginning, IntArray]]:
        """Rows that go on from others: their part, where they begin, and which they are."""
        rows = np.flatnonzero(self.providers != np.arange(len(self.providers)))
        keys = np.stack([self.part_of[rows], self.alone_from[rows], self.part_of[self.providers[rows]]])
        kinds, which = np.unique(keys, axis=1, return_inverse=True)
        for n, (part, block, other) in enumerate(kinds.T.tolist()):
            yield part, self._beginning(part, other, block), rows[which.reshape(-1) == n]

    def _beginning(self, part: int, other: int, block: int) -> Beginning:
        increment, made, halves = Site(block - 1, "mlp_out"), 0, False
        for run in (self.parts[part].run, self.parts[other].run):
            made = bisect_right(run.first_blocks(self.n_layers), block - 1)
            halves = halves or (made < len(run.edits) and run.edits[made].site == increment)
        return Beginning(block - 1, made, halves)


def _split(
    known: _Together, found: Mapping[int, Sequence[tuple[Beginning, IntArray]]]
) -> Iterator[Sequence[Part]]:
    """Every part, by where its rows begin."""
    for number, part in enumerate(known.parts):
        if number not in found:
            yield (part,)
            continue
        by_beginning: dict[Beginning, list[IntArray]] = {}
        for beginning, rows in found[number]:
            by_beginning.setdefault(beginning, []).append(rows - known.starts[number])
        places = {begin: np.sort(np.concatenate(rows)) for begin, rows in by_beginning.items()}
        begun = sum(map(len, places.values()))
        own = []
        if begun < len(part.examples):
            alone = np.setdiff1d(np.arange(len(part.examples)), np.concatenate([*places.values()]))
            own.append(part.of(alone))
        for beginning, rows in places.items():
            some = part if len(rows) == len(part.examples) else part.of(rows)
            own.append(replace(some, run=replace(part.run, beginning=beginning)))
        yield own


def _handed(
    known: _Together,
    found: Mapping[int, Sequence[tuple[Beginning, IntArray]]],
    own_from: Sequence[Site | None],
    reads_of: Mapping[str, Sequence[Read]],
    copies: Mapping[Row, Sequence[Row]],
) -> Mapping[Row, Sequence[Handed]]:
    """What rows hand on of all that is read of others, or of equal ones, before these are by themselves."""
    handed: defaultdict[Row, list[Handed]] = defaultdict(list)
    if not any(reads_of.values()):
        return handed
    begins = {int(row): begin for own in found.values() for begin, rows in own for row in rows}
    for row, begin in begins.items():
        readers = [known.row(row), *copies.get(known.row(row), ())]
        readers = [reader for reader in readers if reads_of[reader[0]]]
        until = begin.sites[-1]
        while readers and row in begins:
            row = int(known.providers[row])
            since = begins[row].sites[-1] if row in begins else own_from[known.part_of[row]]
            assert since is not None
            handed[known.row(row)] += (Handed(reader, since, until) for reader in readers)
            until = since
    return handed
