"""Bound runs: specs with every selector resolved."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.joins import Beginning, Blocks, Join, known_before
from vit_mechinterp.engine.binding.ops import ablate, interchange, operator_of
from vit_mechinterp.engine.binding.positions import ALL, Positions
from vit_mechinterp.engine.binding.readout import BoundReadout
from vit_mechinterp.engine.binding.stop import Stop
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read, RunOrigin
from vit_mechinterp.spec import Intervention, Run, Site, TensorRef
from vit_mechinterp.spec.named import selecting_columns, source_of

__all__ = ["Bound", "BoundCapture", "BoundRun", "Edit"]


@dataclass(frozen=True)
class Edit:
    """One intervention, bound: where it acts and what it reads.

    ``mean`` is the read to be averaged over the dataset (mean ablation); ``refs`` are its tensors by field
    name; ``choice`` holds an index per example; ``idle`` are the examples in which it changes nothing that is
    read. If it ``carries`` another value, that value of its base is what it edits, and what is changed of it
    is added at its site.
    """

    spec: Intervention
    site: Site
    positions: Positions
    keys: Positions
    source: Read | None
    mean: Read | None
    refs: tuple[tuple[str, TensorRef], ...]
    choice: tuple[int, ...] | None
    where: str
    idle: tuple[int, ...] = ()
    carries: Read | None = None

    @property
    def source_run(self) -> str | None:
        """Name of the run whose edited value is read, if one is."""
        origin = None if self.source is None else self.source.origin
        return origin.run if isinstance(origin, RunOrigin) else None

    @property
    def reads(self) -> Iterator[Read]:
        """What it reads of images and runs."""
        return (read for read in (self.source, self.carries) if read is not None)

    @cached_property
    def puts_in(self) -> bool:
        """Whether it puts something in place of what it is given."""
        return self.carries is None and operator_of(self.spec) in (interchange, ablate) and self.keys.is_all

    def with_heads(self, heads: tuple[int, ...] | None) -> Edit:
        """The same edit at other heads, which it reads where it reads anything."""
        reads = (None if read is None else replace(read, heads=heads) for read in (self.source, self.mean))
        source, mean = reads
        return replace(self, spec=self.spec.model_copy(update={"heads": heads}), source=source, mean=mean)

    def with_positions(self, positions: Positions, sources: Positions = ALL) -> Edit:
        """The same edit at other tokens, and reading others where it has a source."""
        source = None if self.source is None else replace(self.source, positions=sources)
        return replace(self, positions=positions, source=source)

    @cached_property
    def choices(self) -> IntArray:
        """The index of every example."""
        return np.array(self.choice or (), dtype=np.int64)


@dataclass(frozen=True)
class BoundCapture:
    """One value to keep from a run, under the name that the results give it."""

    name: str
    read: Read


@dataclass(frozen=True)
class BoundRun:
    """One run, bound: edits in forward order, and captures told apart by whether the edits reach them.

    ``origin`` is where the clean values of its rows come from, which start from them, unless ``blank``:
    then the first edit replaces all that is read of the residual stream. ``clean_before`` is the site before
    which nothing that is read of the run is edited, if its rows are another run's and edited earlier.
    ``beginning`` is where rows go on from what others have been through. ``clean_to`` is the number of blocks
    that the clean forwards of its bases pass whatever its own rows start from. ``ends`` is the last place at
    which something of its rows is read, if their output is not. ``bypasses`` are the layers of the blocks
    that its rows do not pass through, because all that these add to the stream is replaced.
    """

    run: Run
    edits: tuple[Edit, ...]
    captures: tuple[BoundCapture, ...]
    origin: ColumnOrigin
    blocks: Blocks
    blank: bool = False
    clean_before: Site | None = None
    beginning: Beginning | None = None
    clean_to: int = 0
    ends: Stop | None = None
    bypasses: frozenset[int] = frozenset()

    @cached_property
    def name(self) -> str:
        """The run's name."""
        return self.run.name

    @property
    def has_output(self) -> bool:
        """Whether anybody wants its output."""
        return self.run.output

    @property
    def end(self) -> int:
        """The number of blocks behind which nothing of its rows is read."""
        return self.blocks.n if self.ends is None else self.ends.blocks

    def with_edits(self, edits: Iterable[Edit]) -> BoundRun:
        """The same run with other edits; itself if they are its own."""
        own = tuple(edits)
        same = len(own) == len(self.edits) and all(map(operator.is_, own, self.edits))
        return self if same else replace(self, edits=own)

    @cached_property
    def first(self) -> Site | None:
        """The site of the first edit that its rows have before them; None if there is none."""
        made = self.beginning.made if self.beginning else 0
        return self.edits[made].site if made < len(self.edits) else None

    @property
    def to_make(self) -> Iterator[tuple[int, Edit]]:
        """The edits that its rows have before them, with their places among all. (Behind their end there are
        some where the run is an equal one's, which goes on.)"""
        made = self.beginning.made if self.beginning else 0
        for place, edit in enumerate(self.edits[made:], made):
            if self.ends is None or Stop.for_site(edit.site, self.blocks.n) <= self.ends:
                yield place, edit

    @cached_property
    def known_at(self) -> Site | None:
        """The last site before its rows' first edit at which they are given clean values, so that no part of
        the block before it is computed for them; None where nothing of a block is."""
        first = self.first
        if first is None or first.layer is None or self.blank or self.beginning is not None:
            return None
        if first.layer >= self.clean_to or first.layer in self.blocks.through | self.bypasses:
            return None
        return known_before(first)

    @property
    def own_from(self) -> Site | None:
        """The first site at which its rows hold what no other forward gives; None for a clean run."""
        return self.beginning.sites[-1] if self.beginning else self.first

    @cached_property
    def departs_at(self) -> Site | None:
        """The first site at which the run's value is not the clean forward's; None if there is none."""
        sites = [edit.site for edit in self.edits[:1]]
        if self.clean_before is not None:
            # Where an edit that was another run's does nothing in some examples, the first left is later.
            sites.append(self.clean_before)
        return max(sites, default=None)

    def is_clean_at(self, site: Site) -> bool:
        """Whether the run's value at a site is the clean forward's."""
        return self.departs_at is None or site < self.departs_at

    def holds(self, read: Read) -> bool:
        """Whether its rows hold what is read of the run: what its edits reach and, in the block that they
        join at, what is there before."""
        return not self.is_clean_at(read.site) or (self.is_own(read) and self.passes_unedited(read.site))

    def is_own(self, read: Read) -> bool:
        """Whether a value of the run is read, or one of the image that its rows start from."""
        return isinstance(read.origin, RunOrigin) or read.origin == self.origin

    def passes_unedited(self, site: Site) -> bool:
        """Whether its rows pass a place inside the block that they join at with their base's clean value,
        which no clean forward has to give then."""
        first = self.first
        if first is None or self.beginning is not None or self.blank or self.known_at is not None:
            return False
        layer = self.join.first_block
        is_there = site.layer == layer and site.name != "resid_pre" and layer not in self.bypasses
        return is_there and site < first

    @cached_property
    def join(self) -> Join:
        """Where the run's rows enter the growing batch; only for runs with edits."""
        if self.beginning is not None:
            return Join(self.beginning.layer, True)
        return self.blocks.join(self.edits[0].site)

    @cached_property
    def first_blocks(self) -> tuple[int, ...]:
        """For every edit, the first block whose output it may change."""
        return tuple(self._first_block(edit.site) for edit in self.edits)

    def _first_block(self, site: Site) -> int:
        # Rows that bypass a block have all of its edits made at once.
        if site.layer is not None and site.layer in self.bypasses and site.name != "resid_post":
            return site.layer
        return self.blocks.join(site).first_block

    def is_inside(self, layer: int) -> bool:
        """Whether its rows pass through a block, if they have not ended before."""
        return self.join.first_block <= layer and layer not in self.bypasses

    @cached_property
    def passes(self) -> int:
        """The number of blocks that its rows pass through."""
        return self.passed(self.join.first_block, self.end)

    def passed(self, start: int, stop: int) -> int:
        """The number of blocks that it passes through from one block to before another."""
        return max(0, stop - start) - sum(start <= layer < stop for layer in self.bypasses)

    @property
    def starts_at_mlp_out(self) -> bool:
        """Whether the run's rows join behind a block with an MLP increment of their own."""
        if self.beginning is not None:
            return self.beginning.halves
        return self.first is not None and self.blocks.is_increment(self.first)


@dataclass(frozen=True)
class Bound:
    """Every run of an experiment, bound to a model (and to data, if given), in stages.

    A run whose source is another run's edited value stands in a later stage than that run.
    """

    runs: tuple[BoundRun, ...]
    stages: tuple[tuple[BoundRun, ...], ...]
    run_reads: tuple[Read, ...]
    """Values of edited runs that other runs read."""
    readout: BoundReadout | None = None
    """What is kept of every output; None for all of it."""
    left_out: tuple[str, ...] = ()
    """Where interventions were left out, because they change nothing that is read."""
    postponed: tuple[str, ...] = ()
    """Where interventions stand that are made later, where that is the same."""
    not_postponed: tuple[str, ...] = ()
    """Where interventions stand that could be made later, but for what a store is likelier to have."""
    without_base: tuple[str, ...] = ()
    """For every run of whose base its rows hold nothing, what they hold instead."""

    @classmethod
    def of(cls, runs: Sequence[BoundRun], sources_first: Sequence[BoundRun]) -> Bound:
        """Put runs into stages; ``sources_first`` are the same runs, each behind those that it reads."""
        levels: dict[str, int] = {}
        reads: dict[Read, None] = {}
        for run in sources_first:
            level = 0
            for edit in run.edits:
                if edit.source is not None and (other := edit.source_run) is not None:
                    reads[edit.source] = None
                    level = max(level, levels[other] + 1)
            levels[run.name] = level
        stages: dict[int, list[BoundRun]] = {}
        # Of equal rows the first one is computed: it is to be one that goes to the end, if there is one.
        for run in sorted(runs, key=lambda run: not run.has_output):
            if run.edits:
                stages.setdefault(levels[run.name], []).append(run)
        return cls(tuple(runs), tuple(tuple(stages[level]) for level in sorted(stages)), tuple(reads))

    def with_runs(self, runs: Mapping[str, BoundRun]) -> Bound:
        """The same experiment with other edits of its runs, by name; itself where all are the same."""
        own = [runs[run.name] for run in self.runs]
        if all(new is run for new, run in zip(own, self.runs, strict=True)):
            return self
        staged = [runs[run.name] for stage in self.stages for run in stage]
        unedited = [runs[run.name] for run in self.runs if not run.edits]
        bound = Bound.of(own, [*unedited, *staged])
        return replace(self, runs=bound.runs, stages=bound.stages, run_reads=bound.run_reads)

    @cached_property
    def with_output(self) -> tuple[BoundRun, ...]:
        """The runs whose output is wanted, in the order of the outputs."""
        return tuple(run for run in self.runs if run.has_output)

    @cached_property
    def image_columns(self) -> frozenset[str]:
        """Names of the image columns that the runs read."""
        bases = {run.run.base for run in self.runs}
        sources = (source_of(spec) for run in self.runs for spec in run.run.interventions)
        return frozenset(bases | {source for source in sources if isinstance(source, str)})

    @cached_property
    def reads_of(self) -> dict[str, tuple[Read, ...]]:
        """Values of every run that somebody wants: its captures, and what other runs read."""
        reads: dict[str, list[Read]] = {run.name: [c.read for c in run.captures] for run in self.runs}
        for read in self.run_reads:
            assert isinstance(read.origin, RunOrigin)
            reads[read.origin.run].append(read)
        return {name: tuple(dict.fromkeys(own)) for name, own in reads.items()}

    @cached_property
    def named(self) -> dict[str, BoundRun]:
        """The runs by name."""
        return {run.name: run for run in self.runs}

    @cached_property
    def columns(self) -> frozenset[str]:
        """Names of all columns that decide the results: images, and those that select, choose or read out."""
        own = {name for run in self.runs for name in selecting_columns(run.run)}
        return self.image_columns | own | (self.readout.spec.columns if self.readout else frozenset())
