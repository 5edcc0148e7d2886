"""The order of rows: which of them share a growing batch, and who stands beside whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import BoundRun
from vit_mechinterp.engine.rows.numbering import Part
from vit_mechinterp.spec import BLOCK_SITES

__all__ = ["Segment", "filled", "in_waves", "starts_late"]

EARLY = BLOCK_SITES.index("ln1")
"""The last place in a block up to which nothing worth sparing has been computed."""


class Rows(Protocol):
    """Rows of one run: one for each of some examples, which ascend where rows of one image are to stand
    together."""

    @property
    def run(self) -> BoundRun: ...

    @property
    def examples(self) -> IntArray: ...


Own = TypeVar("Own", bound=Rows)


@dataclass(frozen=True)
class Segment:
    """Rows of one wave that belong to one run: one row per example. ``begins`` holds the state that each of
    them goes on from, if other rows have been through its beginning."""

    run: BoundRun
    examples: tuple[int, ...]
    begins: tuple[int, ...] = ()


def starts_late(run: BoundRun) -> bool:
    """Whether a run's rows stay as they join for a part of the first block that they pass through."""
    first = run.first
    if first is None or first.layer is None or first.layer != run.join.first_block:
        return False
    if first.layer in run.bypasses:
        return False
    return BLOCK_SITES.index(first.name) > EARLY


def in_waves(parts: Sequence[Part], width: int, *, spares: bool) -> Iterator[list[Segment]]:
    """The waves of `filled`, as segments."""
    for wave in filled(parts, width, spares=spares):
        yield [
            Segment(part.run, tuple(examples.tolist()), tuple(part.begins(examples).tolist()))
            for part, examples in wave
        ]


def filled(parts: Sequence[Own], width: int, *, spares: bool) -> Iterator[list[tuple[Own, IntArray]]]:
    """Fill waves of at most ``width`` rows, in the order in which the rows join; each part with the examples
    that a wave holds of it.

    Where a part of the joining block can be spared, all rows of an example stand together in one wave, as far
    as they fit; elsewhere rows of one run do, which makes for the fewest edits.
    """
    wave: list[tuple[Own, IntArray]] = []
    free = width
    for pieces in _pieces(parts, width, spares=spares):
        size = sum(len(examples) for _, examples in pieces)
        if len(pieces) > 1 and size > free and wave:
            yield _merged(wave)
            wave, free = [], width
        for part, examples in pieces:
            rest = examples
            while len(rest):
                taken, rest = rest[:free], rest[free:]
                wave.append((part, taken))
                free -= len(taken)
                if free == 0:
                    yield _merged(wave)
                    wave, free = [], width
    if wave:
        yield _merged(wave)


def _pieces(parts: Sequence[Own], width: int, *, spares: bool) -> Iterator[list[tuple[Own, IntArray]]]:
    """Rows in order; those of one list belong together."""

    def place(part: Own) -> tuple[int, bool, bool]:
        join = part.run.join
        return join.layer, join.behind, spares and starts_late(part.run)

    for (_, _, late), group in groupby(sorted(parts, key=place), key=place):
        members = list(group)
        if not late or len(members) == 1:
            yield from ([(part, part.examples)] for part in members)
            continue
        examples = np.unique(np.concatenate([part.examples for part in members]))
        together = max(1, width // len(members))
        for start in range(0, len(examples), together):
            first, last = examples[start], examples[min(start + together, len(examples)) - 1]
            tile = []
            for part in members:
                low, high = np.searchsorted(part.examples, [first, last + 1])
                if high > low:
                    tile.append((part, part.examples[low:high]))
            yield tile


def _merged(wave: Sequence[tuple[Own, IntArray]]) -> list[tuple[Own, IntArray]]:
    """Rows of one part that follow one another stand together."""
    merged: list[tuple[Own, IntArray]] = []
    for part, examples in wave:
        if merged and merged[-1][0] is part:
            merged[-1] = part, np.concatenate([merged[-1][1], examples])
        else:
            merged.append((part, examples))
    return merged
