"""What has to be computed, in which order: what the plan counts and the engine carries out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vit_mechinterp.engine.bound import Bound, BoundRun
from vit_mechinterp.engine.positions import IntArray, Positions
from vit_mechinterp.engine.values import ColumnOrigin, Read, RunOrigin
from vit_mechinterp.spec import Site

__all__ = ["Schedule", "Segment", "Stop", "permutation"]


@dataclass(frozen=True)
class Stop:
    """Where a clean forward may stop: before or behind a block; None as layer: it runs to the end."""

    layer: int | None
    before: bool = False

    def blocks(self, n_layers: int) -> int:
        """How many blocks have run by then."""
        return n_layers if self.layer is None else self.layer + (not self.before)


@dataclass(frozen=True)
class Segment:
    """Rows of one wave that belong to one run: one row per example."""

    run: BoundRun
    examples: tuple[int, ...]


def permutation(seed: int, n: int) -> IntArray:
    """The seeded permutation of a whole dataset that resample ablation draws from."""
    return np.random.default_rng(seed).permutation(n)


def seed_of(read: Read) -> int | None:
    """The seed of the permutation that a clean read takes its images from; None for each example's own."""
    assert isinstance(read.origin, ColumnOrigin)
    return read.origin.permutation


def stop_for(site: Site) -> Stop:
    """Where a forward may stop once this site has been seen."""
    if site.name == "embed":
        return Stop(0, before=True)
    if site.layer is None:
        return Stop(None)
    return Stop(site.layer, before=site.name == "resid_pre")


@dataclass(frozen=True)
class Schedule:
    """All the work of one experiment on ``n_examples`` examples, in chunks, each in clean forwards and waves.

    Args:
        bound: the bound runs.
        n_layers: number of blocks of the model.
        n_examples: number of examples.
        chunk: examples per chunk.
        width: most rows in one forward.
        one_image: why the model takes one image per forward, or None (see `Family`). Rows that join behind
            its embeddings are not limited by it.
    """

    bound: Bound
    n_layers: int
    n_examples: int
    chunk: int
    width: int
    one_image: str | None = None

    @property
    def clean_width(self) -> int:
        """Most rows in one clean forward."""
        return self.width if self.one_image is None else 1

    @property
    def chunks(self) -> list[range]:
        """Consecutive ranges of examples."""
        return [range(i, min(i + self.chunk, self.n_examples)) for i in range(0, self.n_examples, self.chunk)]

    @cached_property
    def mean_reads(self) -> tuple[Read, ...]:
        """Reads to be averaged over the dataset."""
        means = (edit.mean for run in self.bound.runs for edit in run.edits)
        return tuple(dict.fromkeys(m for m in means if m is not None))

    @property
    def means_come_first(self) -> bool:
        """Whether dataset means need forwards of their own, because the dataset spans several chunks."""
        return bool(self.mean_reads) and len(self.chunks) > 1

    @cached_property
    def outputs(self) -> frozenset[str]:
        """Image columns whose clean output is a result: the bases of runs without edits."""
        return frozenset(run.run.base for run in self.bound.runs if not run.edits)

    @cached_property
    def clean_reads(self) -> tuple[Read, ...]:
        """Every value of a clean forward that somebody reads: sources, captures, and where rows join."""
        reads: dict[Read, None] = {}
        for run in self.bound.runs:
            for edit in run.edits:
                if edit.source is not None and isinstance(edit.source.origin, ColumnOrigin):
                    reads[edit.source] = None
            reads.update(dict.fromkeys(c.read for c in run.captures if run.is_clean_at(c.read.site)))
            if run.edits:
                reads.update(dict.fromkeys(join_reads(run, self.n_layers)))
        if not self.means_come_first:
            reads.update(dict.fromkeys(self.mean_reads))
        return tuple(reads)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Image columns that need clean forwards."""
        return tuple(dict.fromkeys((*self.columns_of(self.clean_reads), *sorted(self.outputs))))

    def columns_of(self, reads: Sequence[Read]) -> tuple[str, ...]:
        """Image columns that some reads are taken from, each once."""
        columns = (read.origin.column for read in reads if isinstance(read.origin, ColumnOrigin))
        return tuple(dict.fromkeys(columns))

    def reads_of(self, column: str, reads: Sequence[Read] | None = None) -> list[Read]:
        """The clean reads of one image column."""
        return [
            read
            for read in (self.clean_reads if reads is None else reads)
            if isinstance(read.origin, ColumnOrigin) and read.origin.column == column
        ]

    def stop(self, column: str, reads: Sequence[Read] | None = None) -> Stop:
        """Where the clean forwards of a column may stop."""
        if reads is None and column in self.outputs:
            return Stop(None)
        stops = [stop_for(read.site) for read in self.reads_of(column, reads)]
        return max(stops, key=lambda s: (s.layer is None, s.layer or 0, not s.before))

    def images_of(self, seed: int | None, chunk: range) -> list[int]:
        """The examples whose images a chunk's clean reads are taken from; ``seed`` is their permutation's."""
        if seed is None:
            return list(chunk)
        images: list[int] = self._permutation(seed)[chunk.start : chunk.stop].tolist()
        return images

    def _permutation(self, seed: int) -> IntArray:
        if seed not in self._permutations:
            self._permutations[seed] = permutation(seed, self.n_examples)
        return self._permutations[seed]

    @cached_property
    def _permutations(self) -> dict[int, IntArray]:
        return {}

    def images(self, column: str, chunk: range, reads: Sequence[Read] | None = None) -> list[int]:
        """The examples whose image of a column must pass through the model for a chunk, each once."""
        seeds = dict.fromkeys(seed_of(read) for read in self.reads_of(column, reads))
        wanted = {image for seed in seeds for image in self.images_of(seed, chunk)}
        if reads is None and column in self.outputs:
            wanted.update(chunk)
        return sorted(wanted)

    def waves(
        self, stage: tuple[BoundRun, ...], chunk: range, width: int | None = None
    ) -> Iterator[list[Segment]]:
        """Groups of runs whose rows fit into one growing batch, in the order in which their rows join."""
        width = width or self.width
        ordered = sorted(stage, key=lambda run: run.join(self.n_layers))
        per_wave = max(1, width // len(chunk))
        for i in range(0, len(ordered), per_wave):
            group = ordered[i : i + per_wave]
            for start in range(0, len(chunk), width):
                yield [Segment(run, tuple(chunk[start : start + width])) for run in group]

    def wave_blocks(self, segments: Sequence[Segment]) -> int:
        """(row, block) pairs of one wave."""
        return sum(
            len(s.examples) * (self.n_layers - s.run.join(self.n_layers).first_block) for s in segments
        )


def join_reads(run: BoundRun, n_layers: int) -> tuple[Read, ...]:
    """The clean values that a run's rows start from."""
    join = run.join(n_layers)
    if starts_at_mlp_out(run):
        # Exact: the row's residual stream is what the block would have computed from its edited increment.
        return (
            Read(run.origin, Site(join.layer, "resid_mid")),
            Read(run.origin, Site(join.layer, "mlp_out")),
        )
    return (Read(run.origin, join.site, Positions()),)


def starts_at_mlp_out(run: BoundRun) -> bool:
    """Whether a run's rows join behind a block with an MLP increment of their own."""
    return run.first is not None and run.first.name == "mlp_out" and not run.through


def wave_reads(run: BoundRun, bound: Bound) -> list[Read]:
    """Values to read off a run's own rows: captures behind its first edit, and what other runs read."""
    own = [c.read for c in run.captures if not run.is_clean_at(c.read.site)]
    return own + [r for r in bound.run_reads if isinstance(r.origin, RunOrigin) and r.origin.run == run.name]
