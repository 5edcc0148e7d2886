"""Rows that go on from what other rows have been through, where both begin with the same edits.

Rows are one as long as their images and the edits made so far are equal. Of all rows that are in one state in
a block, one passes through it; the others begin behind the last block of which that is true, each with a copy
of that row's residual stream.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import BoundRun
from vit_mechinterp.engine.binding.joins import Beginning
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.rows.numbering import Part
from vit_mechinterp.spec import Site

__all__ = ["Branches", "Handed", "Row", "branches"]

Row = tuple[str, int]
"""A run's name, and an example."""


@dataclass(frozen=True)
class Handed:
    """What a row hands to another one that goes on from it: all that is read of that other row from ``since``
    on (None: from where the row starts) and before ``until``."""

    row: Row
    since: Site | None
    until: Site


@dataclass(frozen=True)
class Branches:
    """Rows of one chunk, stage by stage, each from where it goes on by itself."""

    parts: tuple[tuple[Part, ...], ...]
    forks: Sequence[Fork] = ()
    reads_of: Mapping[str, Sequence[Read]] = field(default_factory=dict)
    copies: Mapping[Row, Sequence[Row]] = field(default_factory=dict)

    @cached_property
    def gifts(self) -> Mapping[Row, Mapping[tuple[Site, int], None]]:
        """The states that a row hands on, each with the site that it is seen at."""
        gifts: defaultdict[Row, dict[tuple[Site, int], None]] = defaultdict(dict)
        for fork in filter(self.goes_on, self.forks):
            name, sites = fork.provider.run.name, fork.beginning.sites
            for example, state in zip(fork.providers.tolist(), fork.states.tolist(), strict=True):
                gifts[name, example].update(((site, state), None) for site in sites)
        return gifts

    @property
    def n_states(self) -> int:
        """How many values of the residual stream are handed on."""
        by_site: defaultdict[Site, list[IntArray]] = defaultdict(list)
        for fork in filter(self.goes_on, self.forks):
            for site in fork.beginning.sites:
                by_site[site].append(fork.states)
        return sum(len(np.unique(np.concatenate(states))) for states in by_site.values())

    def goes_on(self, fork: Fork) -> bool:
        """Whether anything is left for the rows of a fork that other rows do not hand on."""
        run, beginning = fork.part.run, fork.beginning
        if run.end > beginning.layer + 1 or run.has_output or beginning.made < len(run.edits):
            return True
        rows = ((run.name, example) for example in fork.examples.tolist())
        readers = {run.name, *(name for row in rows for name, _ in self.copies.get(row, ()))}
        return any(read.site >= beginning.sites[-1] for name in readers for read in self.reads_of[name])

    @cached_property
    def handed(self) -> Mapping[Row, Sequence[Handed]]:
        """What a row hands on of all that is read of others, or of equal ones, before these are by
        themselves."""
        handed: defaultdict[Row, list[Handed]] = defaultdict(list)
        if not any(self.reads_of.values()):
            return handed
        begun = {row: (fork, provider) for fork in self.forks for row, provider in fork.rows}
        for row in begun:
            readers = [reader for reader in (row, *self.copies.get(row, ())) if self.reads_of[reader[0]]]
            while readers and row in begun:
                fork, provider = begun[row]
                since = begun[provider][0].beginning.sites[-1] if provider in begun else None
                until = fork.beginning.sites[-1]
                handed[provider] += (Handed(reader, since, until) for reader in readers)
                row = provider
        return handed


@dataclass(frozen=True)
class Fork:
    """Rows of one part that go on from rows of another one, behind one block: examples of both, pair by pair,
    and the states that they have in common."""

    part: Part
    beginning: Beginning
    provider: Part
    examples: IntArray
    providers: IntArray
    states: IntArray

    @property
    def rows(self) -> Iterator[tuple[Row, Row]]:
        """Every row, and the one that it goes on from."""
        own, other = self.part.run.name, self.provider.run.name
        pairs = zip(self.examples.tolist(), self.providers.tolist(), strict=True)
        return (((own, example), (other, provider)) for example, provider in pairs)


def branches(
    stages: Sequence[Sequence[Part]],
    reads_of: Mapping[str, Sequence[Read]],
    copies: Mapping[Row, Sequence[Row]],
) -> Branches:
    """Find where every row of a chunk goes on by itself.

    Args:
        stages: rows that are computed, all of them different.
        reads_of: what is read of every run.
        copies: rows that are equal to one that is computed, by that one.
    """
    known = _Together.of(stages)
    if known is None:
        return Branches(tuple(map(tuple, stages)))
    forks: defaultdict[int, list[Fork]] = defaultdict(list)
    for number, fork in known.forks():
        forks[number].append(fork)
    found = Branches((), [fork for own in forks.values() for fork in own], reads_of, copies)
    split = (_split(part, forks[number], found.goes_on) for number, part in enumerate(known.parts))
    return replace(found, parts=tuple(tuple(own for _ in stage for own in next(split)) for stage in stages))


@dataclass(frozen=True)
class _Together:
    """Rows in arrays: of which part each is, from which block on it is by itself, and which row passes
    through the block before that for it."""

    parts: Sequence[Part]
    starts: IntArray
    part_of: IntArray
    alone_from: IntArray
    providers: IntArray

    @classmethod
    def of(cls, stages: Sequence[Sequence[Part]]) -> _Together | None:
        """Those of a chunk; None where each row is by itself from its first edit on."""
        parts = [part for stage in stages for part in stage]
        if all(len(part.states) < 2 for part in parts):
            return None
        first = np.concatenate([part.states[0] for part in parts])
        if len(np.unique(first)) == len(first):
            return None
        starts = np.cumsum([0, *(len(part.examples) for part in parts)])
        part_of = np.repeat(np.arange(len(parts)), np.diff(starts))
        stage_of_part = np.repeat(np.arange(len(stages)), [len(stage) for stage in stages])
        states = _states_in_blocks(parts, starts)
        passing = _passing(states, stage_of_part[part_of], len(stages))
        rows, blocks = np.arange(len(first)), parts[0].run.blocks
        passes = (passing == rows) & (states >= 0)
        ends = np.array([part.run.end for part in parts])[part_of]
        own_from = np.where(passes.any(axis=0), passes.argmax(axis=0), ends)
        may_join = np.array([blocks.last_open(block) for block in range(blocks.n + 1)])
        joins = np.array([part.run.first_blocks[0] for part in parts])[part_of]
        alone_from = np.maximum(joins, may_join[own_from])
        before = passing[np.maximum(alone_from - 1, 0), rows]
        return cls(parts, starts, part_of, alone_from, np.where(alone_from > joins, before, rows))

    def forks(self) -> Iterator[tuple[int, Fork]]:
        """Rows that go on from others, with the number of their part."""
        rows = np.flatnonzero(self.providers != np.arange(len(self.providers)))
        if not len(rows):
            return
        others = self.providers[rows]
        keys = np.stack([self.part_of[rows], self.alone_from[rows], self.part_of[others]])
        kinds, which = np.unique(keys, axis=1, return_inverse=True)
        order = np.argsort(which.reshape(-1), kind="stable")
        ends = np.cumsum(np.bincount(which.reshape(-1), minlength=kinds.shape[1]))
        for (number, block, other), own in zip(kinds.T.tolist(), np.split(order, ends[:-1]), strict=True):
            part, provider = self.parts[number], self.parts[other]
            beginning = _beginning(part.run, provider.run, block)
            places = rows[own] - self.starts[number]
            yield (
                number,
                Fork(
                    part,
                    beginning,
                    provider,
                    examples=part.examples[places],
                    providers=provider.examples[others[own] - self.starts[other]],
                    states=part.states[beginning.made - 1][places],
                ),
            )


def _states_in_blocks(parts: Sequence[Part], starts: IntArray) -> IntArray:
    """The state of every row in every block, ``[block, row]``; -1 before its first edit, and where it has
    ended."""
    n_layers = parts[0].run.blocks.n
    states = np.full((n_layers, starts[-1]), -1, dtype=np.int64)
    for number, part in enumerate(parts):
        own, blocks = slice(starts[number], starts[number + 1]), part.run.first_blocks
        for state, since, until in zip(part.states, blocks, [*blocks[1:], n_layers], strict=True):
            states[since : min(until, part.run.end), own] = state
    return states


def _passing(states: IntArray, stage_of: IntArray, n_stages: int) -> IntArray:
    """For every row the one that passes through each block for it, ``[block, row]``: the first in order of
    those in one state, here and so in every later block that it is in."""
    n_layers, n = states.shape
    passing = np.tile(np.arange(n), (n_layers, 1))
    for layer, of_block in enumerate(states):
        there = np.flatnonzero(of_block >= 0)
        if layer == n_layers - 1:  # of whose tokens one stage may leave out what another one reads
            of_block = of_block * n_stages + stage_of
        _, firsts, which = np.unique(of_block[there], return_index=True, return_inverse=True)
        passing[layer, there] = there[firsts[which.reshape(-1)]]
    return passing


def _beginning(run: BoundRun, other: BoundRun, block: int) -> Beginning:
    """Where rows of a run go on by themselves, before some block, from rows of another one."""
    made = bisect_right(run.first_blocks, block - 1)
    to_come = [own.edits[made].site for own in (run, other) if made < len(own.edits)]
    return Beginning(block - 1, made, halves=Site(block - 1, "mlp_out") in to_come)


def _split(part: Part, forks: Sequence[Fork], goes_on: Callable[[Fork], bool]) -> Sequence[Part]:
    """A part, by where its rows begin, without those that do not go on."""
    if not forks:
        return (part,)
    by_beginning: dict[Beginning, list[IntArray]] = {}
    for fork in filter(goes_on, forks):
        by_beginning.setdefault(fork.beginning, []).append(fork.examples)
    own = []
    if sum(len(fork.examples) for fork in forks) < len(part.examples):
        begun = np.concatenate([fork.examples for fork in forks])
        own.append(part.of(np.flatnonzero(~np.isin(part.examples, begun))))
    for beginning, several in by_beginning.items():
        examples = several[0] if len(several) == 1 else np.sort(np.concatenate(several))
        whole = len(examples) == len(part.examples)
        some = part if whole else part.of(np.searchsorted(part.examples, examples))
        own.append(replace(some, run=replace(part.run, beginning=beginning)))
    return own
