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
    everyone, run = np.array(segment.examples), segment.run
    found: list[Reader] = []

    def add(
        name: str, rows: IntArray | slice, examples: IntArray, since: Site | None, until: Site | None = None
    ) -> None:
        """``since`` is where rows are by themselves that go on from others; None for those that do not."""
        reader, first = material.bound.named[name], since or run.first
        for read in material.bound.reads_of[name]:
            if first is not None and first <= read.site:
                is_held = not reader.is_clean_at(read.site)
            else:
                is_held = since is None and reader.is_own(read) and run.passes_unedited(read.site)
            if is_held and (until is None or read.site < until):
                found.append(Reader(name, read, rows, examples))

    since = run.beginning.sites[-1] if run.beginning else None
    add(run.name, slice(0, len(everyone)), everyone, since)
    others: dict[tuple[str, Site | None, Site | None], list[tuple[int, int]]] = defaultdict(list)
    for row, example in enumerate(segment.examples):
        key = run.name, example
        for name, other in material.handover.copies.get(key, ()):
            others[name, since, None].append((row, other))
        for own in material.handover.handed.get(key, ()):
            others[own.row[0], own.since, own.until].append((row, own.row[1]))
    for (name, first, last), pairs in others.items():
        rows, of = (np.array(own) for own in zip(*pairs, strict=True))
        add(name, rows, of, first, last)
    return found
