"""Numbers for what rows have been through: two rows are in one state if their images and edits are equal.

A row's states are those behind its first edit, behind its first two, and so on to its last, by which whole
rows are compared. Rows that differ later on may be in one state before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import BoundRun
from vit_mechinterp.engine.rows.row_keys import Key, RowKeys

__all__ = ["Numbering", "Part"]

Columns = Sequence[IntArray]


@dataclass(frozen=True)
class Part:
    """Rows of one run on which the same edits act: the run with these edits alone, the examples, which
    ascend, the state behind each edit, ``[row]``, and the part's number in its stage."""

    run: BoundRun
    examples: IntArray
    states: tuple[IntArray, ...] = ()
    number: int = 0

    def of(self, places: IntArray | slice) -> Part:
        """Some of the rows."""
        states = tuple(own[places] for own in self.states)
        return replace(self, examples=self.examples[places], states=states)

    def begins(self, examples: IntArray) -> IntArray:
        """The states that rows of some examples go on from; none if these begin by themselves."""
        beginning = self.run.beginning
        if beginning is None:
            return self.examples[:0]
        return self.states[beginning.made - 1][np.searchsorted(self.examples, examples)]


@dataclass
class _Group:
    """Rows whose edit at one place differs at most in what varies from example to example: the columns of
    numbers that they are compared by, and the states that they got."""

    columns: list[Columns] = field(default_factory=list)
    states: list[IntArray] = field(default_factory=list)


class Numbering:
    """Gives numbers to the states of rows, stage by stage; a state that is known keeps its number.

    Args:
        keys: what rows are compared by.
    """

    def __init__(self, keys: RowKeys) -> None:
        self.keys = keys
        self.count = 0
        self._groups: dict[Key, _Group] = {}

    def parts(self, rows: Sequence[tuple[BoundRun, IntArray]]) -> list[Part]:
        """Runs with the edits that act on some examples, and the states of these examples' rows."""
        states: list[list[IntArray]] = [[] for _ in rows]
        for place in range(max((len(run.edits) for run, _ in rows), default=0)):
            members: dict[Key, list[tuple[int, Columns]]] = {}
            for n, (run, examples) in enumerate(rows):
                if place < len(run.edits):
                    fixed, varying = self.keys.of(run, run.edits[place])
                    base = _of(self.keys.base_of(run), examples) if place == 0 else states[n][-1]
                    key = (place == 0, place == 0 and run.blank, *fixed)
                    columns = [base, *(_of(own, examples) for own in varying)]
                    members.setdefault(key, []).append((n, columns))
            for key, own in members.items():
                found = self._number(self._groups.setdefault(key, _Group()), [columns for _, columns in own])
                for (n, _), numbers in zip(own, found, strict=True):
                    states[n].append(numbers)
        pairs = enumerate(zip(rows, states, strict=True))
        return [Part(run, examples, tuple(own), number) for number, ((run, examples), own) in pairs]

    def _number(self, group: _Group, members: Sequence[Columns]) -> list[IntArray]:
        """States of some rows of one group, by the columns that they are compared by."""
        # Runs that begin alike are compared by the same arrays.
        places: dict[tuple[int, ...], int] = {}
        which = [places.setdefault(tuple(map(id, columns)), len(places)) for columns in members]
        firsts = [members[which.index(n)] for n in range(len(places))]
        if not group.states and len(firsts) == 1 and self.keys.are_distinct(firsts[0][0]):
            found = [self._new(len(firsts[0][0]))]
        else:
            found = self._compared(group, firsts)
        group.columns += firsts
        group.states += found
        return [found[n] for n in which]

    def _compared(self, group: _Group, members: Sequence[Columns]) -> list[IntArray]:
        rows = np.concatenate([np.stack(columns, axis=1) for columns in (*group.columns, *members)])
        _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        known = np.concatenate([np.zeros(0, dtype=np.int64), *group.states])
        is_new = first >= len(known)
        numbers = np.empty(len(first), dtype=np.int64)
        numbers[~is_new] = known[first[~is_new]]
        numbers[is_new] = self._new(int(is_new.sum()))
        of_rows = numbers[which.reshape(-1)][len(known) :]
        return np.split(of_rows, np.cumsum([len(columns[0]) for columns in members])[:-1])

    def _new(self, n: int) -> IntArray:
        self.count += n
        return self.keys.with_distinct(np.arange(self.count - n, self.count))


def _of(numbers: IntArray, examples: IntArray) -> IntArray:
    """Numbers of some examples; the array itself where these are all."""
    return numbers if len(examples) == len(numbers) else numbers[examples]
