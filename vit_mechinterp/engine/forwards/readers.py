"""Who reads values off rows of a wave: their own run, runs of equal rows, and runs that go on from them."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.forwards.editing import Material
from vit_mechinterp.engine.rows.order import Segment
from vit_mechinterp.spec import Site

__all__ = ["Reader", "readers_of"]


class Reader(NamedTuple):
    """A run that reads a value off some rows of a segment, and its examples, one for each of them."""

    run: str
    read: Read
    rows: IntArray | slice
    examples: IntArray


def readers_of(segment: Segment, material: Material) -> list[Reader]:
    """Everybody who reads values off a segment's rows."""
    everyone = np.array(segment.examples)
    found: list[Reader] = []

    def add(
        run: str, rows: IntArray | slice, examples: IntArray, since: Site, until: Site | None = None
    ) -> None:
        first = max(since, material.bound.departures.get(run, since))
        for read in material.bound.reads_of[run]:
            if read.site >= first and (until is None or read.site < until):
                found.append(Reader(run, read, rows, examples))

    since = segment.run.own_from
    if since is not None:
        add(segment.run.name, slice(0, len(everyone)), everyone, since)
    others: dict[tuple[str, Site, Site | None], list[tuple[int, int]]] = defaultdict(list)
    for row, example in enumerate(segment.examples):
        key = segment.run.name, example
        if since is not None:
            for name, other in material.handover.copies.get(key, ()):
                others[name, since, None].append((row, other))
        for own in material.handover.handed.get(key, ()):
            others[own.row[0], own.since, own.until].append((row, own.row[1]))
    for (name, first, last), pairs in others.items():
        rows, of = (np.array(own) for own in zip(*pairs, strict=True))
        add(name, rows, of, first, last)
    return found
