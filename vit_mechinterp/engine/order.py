"""The order of rows: which of them share a growing batch, and who stands beside whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from vit_mechinterp.engine.bound import BoundRun
from vit_mechinterp.engine.positions import IntArray
from vit_mechinterp.engine.sharing import Part
from vit_mechinterp.spec import BLOCK_SITES

__all__ = ["Segment", "in_waves", "starts_late"]

EARLY = BLOCK_SITES.index("ln1")
"""The last place in a block up to which nothing worth sparing has been computed."""


@dataclass(frozen=True)
class Segment:
    """Rows of one wave that belong to one run: one row per example."""

    run: BoundRun
    examples: tuple[int, ...]


def starts_late(run: BoundRun, n_layers: int) -> bool:
    """Whether a run's rows stay clean for a part of the block at whose input they join."""
    first, join = run.first, run.join(n_layers)
    if first is None or first.layer is None or join.behind:
        return False
    return BLOCK_SITES.index(first.name) > EARLY


def in_waves(parts: Sequence[Part], width: int, n_layers: int, *, spares: bool) -> Iterator[list[Segment]]:
    """Fill waves of at most ``width`` rows, in the order in which the rows join.

    Where a part of the joining block can be spared, all rows of an example stand together in one wave, as far
    as they fit; elsewhere rows of one run do, which makes for the fewest edits.
    """
    wave: list[tuple[BoundRun, IntArray]] = []
    free = width
    for pieces in _pieces(parts, width, n_layers, spares=spares):
        size = sum(len(examples) for _, examples in pieces)
        if len(pieces) > 1 and size > free and wave:
            yield _segments(wave)
            wave, free = [], width
        for run, examples in pieces:
            rest = examples
            while len(rest):
                taken, rest = rest[:free], rest[free:]
                wave.append((run, taken))
                free -= len(taken)
                if free == 0:
                    yield _segments(wave)
                    wave, free = [], width
    if wave:
        yield _segments(wave)


def _pieces(
    parts: Sequence[Part], width: int, n_layers: int, *, spares: bool
) -> Iterator[list[tuple[BoundRun, IntArray]]]:
    """Rows in order; those of one list belong together."""

    def place(part: Part) -> tuple[int, bool, bool]:
        join = part.run.join(n_layers)
        return join.layer, join.behind, spares and starts_late(part.run, n_layers)

    for (_, _, late), group in groupby(sorted(parts, key=place), key=place):
        members = list(group)
        if not late or len(members) == 1:
            yield from ([(part.run, part.examples)] for part in members)
            continue
        examples = np.unique(np.concatenate([part.examples for part in members]))
        together = max(1, width // len(members))
        for start in range(0, len(examples), together):
            first, last = examples[start], examples[min(start + together, len(examples)) - 1]
            tile = []
            for part in members:
                low, high = np.searchsorted(part.examples, [first, last + 1])
                if high > low:
                    tile.append((part.run, part.examples[low:high]))
            yield tile


def _segments(wave: Sequence[tuple[BoundRun, IntArray]]) -> list[Segment]:
    """Rows of one run that follow one another make one segment."""
    segments: list[Segment] = []
    previous: BoundRun | None = None
    for run, examples in wave:
        own = tuple(examples.tolist())
        if previous is run:
            segments[-1] = Segment(run, segments[-1].examples + own)
        else:
            segments.append(Segment(run, own))
        previous = run
    return segments
