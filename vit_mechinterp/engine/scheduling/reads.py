"""Who reads which clean values, and of which examples: found once for an experiment, not chunk by chunk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import BoundRun
from vit_mechinterp.engine.binding.joins import Join
from vit_mechinterp.engine.binding.positions import Positions
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read, RunOrigin
from vit_mechinterp.engine.rows.numbering import Part
from vit_mechinterp.engine.rows.sharing import Sharing
from vit_mechinterp.spec import Site

__all__ = [
    "ReadGroups",
    "all_of",
    "clean_read",
    "clean_sources",
    "wanted_by_rows",
    "wanted_by_runs",
]

Wanted = Mapping[Read, IntArray]
"""Reads with the ascending examples that they are wanted of."""


def clean_read(run: BoundRun, read: Read) -> Read:
    """The same value of a run's clean forward."""
    if isinstance(read.origin, RunOrigin):
        return Read(run.origin, read.site, read.positions, read.heads)
    return read


@lru_cache(maxsize=4096)
def _join_reads(
    origin: ColumnOrigin, join: Join, known_at: Site | None, starts_at_mlp_out: bool
) -> tuple[Read, ...]:
    """The clean values that rows start from, if they go on from no others."""
    if known_at is not None and known_at.name == "resid_mid":
        return (Read(origin, known_at),)  # the middle of a block is all that the rest of it is made from
    if known_at is not None:
        return Read(origin, join.site), Read(origin, known_at)
    if starts_at_mlp_out:
        # Exact: the row's residual stream is what the block would have computed from its edited increment.
        return Read(origin, Site(join.layer, "resid_mid")), Read(origin, Site(join.layer, "mlp_out"))
    return (Read(origin, join.site, Positions()),)


def clean_sources(run: BoundRun) -> tuple[Read, ...]:
    """The clean values that a run's rows start from, unless they start blank, and those that its edits
    read."""
    starts = () if run.blank else _join_reads(run.origin, run.join, run.known_at, run.starts_at_mlp_out)
    reads = (read for edit in run.edits for read in edit.reads)
    return (*starts, *(read for read in reads if isinstance(read.origin, ColumnOrigin)))


@dataclass(frozen=True)
class ReadGroups:
    """Parts by what their rows read: the group of every part, and the reads of every group."""

    of: IntArray
    reads: tuple[tuple[Read, ...], ...]

    @classmethod
    def of_parts(cls, parts: Sequence[Part]) -> ReadGroups:
        """Group some parts."""
        known: dict[tuple[Read, ...], int] = {}
        groups = [known.setdefault(clean_sources(part.run), len(known)) for part in parts]
        return cls(np.array(groups, dtype=np.int64), tuple(known))


def wanted_by_rows(parts: Sequence[Part], n_examples: int) -> Wanted:
    """What the rows of some parts start from and read, if all of them are computed."""
    wanted: defaultdict[Read, list[IntArray]] = defaultdict(list)
    for part in parts:
        for read in clean_sources(part.run):
            wanted[read].append(part.examples)
    return _merged(wanted, n_examples)


def wanted_by_runs(sharing: Sharing) -> Wanted:
    """Clean values that stand in for a run's, or that its captures show where its rows do not hold them."""
    bound, n = sharing.bound, sharing.n_examples
    wanted: defaultdict[Read, list[IntArray]] = defaultdict(list)
    for run in bound.runs:
        for read in bound.reads_of[run.name]:
            as_clean = clean_read(run, read)
            wanted[as_clean].append(sharing.clean_rows(run.name))
            for part in sharing.parts.get(run.name, ()):
                if not part.run.holds(read):
                    wanted[as_clean].append(part.examples)
    return _merged(wanted, n)


def _merged(wanted: Mapping[Read, list[IntArray]], n_examples: int) -> Wanted:
    everyone = np.arange(n_examples)
    found = {read: all_of(several, everyone) for read, several in wanted.items()}
    return {read: examples for read, examples in found.items() if len(examples)}


def all_of(several: Sequence[IntArray], everyone: IntArray) -> IntArray:
    """The examples that are in one of several selections, ascending; ``everyone`` itself where these are all
    there are."""
    if any(len(examples) == len(everyone) for examples in several):
        return everyone
    return several[0] if len(several) == 1 else np.unique(np.concatenate(several))
