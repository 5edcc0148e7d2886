"""What a schedule amounts to, counted before it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vit_mechinterp.engine.arrays import NONE, IntArray
from vit_mechinterp.engine.binding.bind import sources_first
from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.binding.joins import Beginning
from vit_mechinterp.engine.binding.stop import Stop
from vit_mechinterp.engine.binding.values import Need
from vit_mechinterp.engine.rows.distinct import distinct_rows
from vit_mechinterp.engine.rows.ending import ending_together
from vit_mechinterp.engine.rows.numbering import Part
from vit_mechinterp.engine.rows.order import Segment, starts_late
from vit_mechinterp.engine.scheduling.clean_groups import CleanGroup
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.store.arrangement import Forecast
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.sparing import PARTS, costs_of
from vit_mechinterp.spec import Ablate, RunSource
from vit_mechinterp.spec.named import source_of

__all__ = ["Counts", "Way", "count"]

Way = tuple[Beginning | None, Stop | None]
"""Where rows go on from others, and where they end."""


@dataclass
class Counts:
    """Totals over all chunks."""

    evaluations: int = 0
    """(row, block) pairs."""
    naive: int = 0
    """The same for one run at a time."""
    launches: int = 0
    """Forwards."""
    widest: int = 0
    """Most rows in one of them."""
    spared: float = 0.0
    """Blocks' worth of the evaluations that rows of one image share, before their edits in a block."""
    unread: float = 0.0
    """Blocks' worth of the evaluations that nobody reads."""
    clean: int = 0
    """Rows that clean forwards answer."""
    shared: int = 0
    """Rows that are copies of equal ones."""
    again: int = 0
    """Images that pass once more, because they occur in several chunks."""
    apart: int = 0
    """Images that pass once for each of several columns, because a store computes these apart."""
    rows_again: int = 0
    """Rows that are equal to rows of other chunks, and computed all the same."""
    begun_again: int = 0
    """What rows of different chunks go through before they differ, and is computed in each."""
    branched: int = 0
    """Rows that go on from others."""
    not_again: int = 0
    """(row, block) pairs that are not computed for these."""
    bypassed: int = 0
    """(row, block) pairs that are not computed because all that the block adds is replaced."""
    ways: Counter[tuple[int, int, Way]] = field(default_factory=Counter)
    """Rows by stage, by the number of their part in it, and by where they go on from others and end."""
    images: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Images of clean forwards by column and number of blocks."""
    needs: dict[Need, None] = field(default_factory=dict)
    """What clean forwards are for."""

    def add(self, own: Counts) -> None:
        """Add what was counted of one chunk."""
        rows = ("shared", "branched", "not_again", "bypassed")
        for name in ("evaluations", "launches", "spared", "unread", *rows):
            setattr(self, name, getattr(self, name) + getattr(own, name))
        self.widest = max(self.widest, own.widest)
        self.ways.update(own.ways)
        self.images.update(own.images)
        self.needs.update(own.needs)


def count(vit: HookedViT, schedule: Schedule, forecast: Forecast | None = None) -> Counts:
    """Count what a schedule computes; its clean forwards as a store foresees them, if there is one."""
    sharing, chunks = schedule.sharing, schedule.chunks
    total = Counts()
    shares = costs_of(vit.module, vit.layout, vit.layout.n_layers // 2) if schedule.spares else {}
    known: dict[int, Counts] = {}
    passed: list[_Passed] = []
    for chunk in chunks:
        if not schedule.reads.is_regular or len(chunk) not in known:
            known[len(chunk)] = _count_chunk(schedule, chunk, shares, clean=forecast is None)
        if not schedule.reads.is_regular and len(chunks) > 1:
            passed.append(_Passed.of(schedule, chunk))
        total.add(known[len(chunk)])
    total.begun_again = _begun_again(passed)
    total.naive = _naive(schedule.bound, schedule.n_layers) * schedule.n_examples
    total.clean = sum(len(sharing.clean_rows(run.name)) for run in schedule.bound.runs)
    total.rows_again = sharing.n_edited_rows - total.shared - sharing.n_classes
    if forecast is not None:
        total.add(_foreseen(forecast))
        total.apart = _apart(schedule, forecast)
        return total
    total.again = _again(schedule)
    if schedule.holds:
        total.needs.update(dict.fromkeys(schedule.needs.common.needs))
        _count_clean(total, schedule.common_batches)
    return total


def _count_chunk(schedule: Schedule, chunk: range, shares: dict[str, float], *, clean: bool) -> Counts:
    own = Counts()
    own.needs.update(dict.fromkeys(schedule.needs.of(chunk)))
    if schedule.needs.means_come_first and clean and not schedule.holds:
        own.needs.update(dict.fromkeys(schedule.reads.means))
        _count_clean(own, schedule.clean_batches(schedule.own_needs(chunk, schedule.reads.means)))
    if clean:
        _count_clean(own, schedule.clean_batches(schedule.own_needs(chunk)))
    of_chunk = schedule.rows.of(chunk)
    for stage, (parts, copies) in enumerate(zip(of_chunk.parts, of_chunk.copies, strict=True)):
        _count_rows(own, schedule, stage, parts)
        own.shared += sum(len(same.examples) for same in copies)
        if schedule.spares and any(starts_late(part.run) for part in parts):
            # Rows of one image stand together as far as they fit, which decides how many waves there are.
            for segments in schedule.waves(parts):
                own.launches += 1
                own.widest = max(own.widest, sum(len(s.examples) for s in segments))
                own.spared += _spared(schedule, segments, shares, schedule.tokens_wanted(stage))
            continue
        for together in ending_together(parts):
            rows = sum(len(part.examples) for part in together)
            own.launches += -(-rows // schedule.width)
            own.widest = max(own.widest, min(rows, schedule.width))
    return own


@dataclass(frozen=True)
class _Passed:
    """The states in which rows of a chunk pass through blocks: all, and those that rows end in."""

    every: IntArray
    last: IntArray

    @classmethod
    def of(cls, schedule: Schedule, chunk: range) -> _Passed:
        every, last = [NONE], [NONE]
        for part in (part for own in schedule.rows.of(chunk).parts for part in own):
            since, end = part.run.first_blocks, part.run.end
            until = [min(block, end) for block in (*since[1:], end)]
            pairs = zip(part.states, since, until, strict=True)
            own = [states if part.run.passed(start, stop) else NONE for states, start, stop in pairs]
            every += own
            last += own[-1:]
        return cls(np.unique(np.concatenate(every)), np.unique(np.concatenate(last)))


def _begun_again(chunks: Sequence[_Passed]) -> int:
    """How many states, other than those of equal rows, several chunks pass through."""
    if not chunks:
        return 0
    every, last = ([own.every for own in chunks], [own.last for own in chunks])
    again = [sum(map(len, own)) - len(np.unique(np.concatenate(own))) for own in (every, last)]
    return again[0] - again[1]


def _foreseen(forecast: Forecast) -> Counts:
    own = Counts(launches=len(forecast.forwards))
    for column, images, blocks in forecast.forwards:
        own.evaluations += len(images) * blocks
        own.widest = max(own.widest, len(images))
        own.images[column, blocks] += len(images)
    return own


def _apart(schedule: Schedule, forecast: Forecast) -> int:
    """Images of one column's forwards that are in another's too."""
    by_column: dict[str, set[int]] = {}
    for column, examples, _ in forecast.forwards:
        by_column.setdefault(column, set()).update(schedule.sharing.images[column][list(examples)].tolist())
    return sum(map(len, by_column.values())) - len(set().union(*by_column.values()))


def _count_rows(own: Counts, schedule: Schedule, stage: int, parts: Sequence[Part]) -> None:
    """Count the rows of one stage and their blocks, whichever waves they pass in."""
    unread = schedule.unread(stage)
    for part in parts:
        run, size = part.run, len(part.examples)
        joined = run.join.first_block
        own.ways[stage, part.number, (run.beginning, run.ends)] += size
        own.evaluations += size * run.passes
        own.bypassed += size * (run.end - joined - run.passes)
        own.unread += size * unread * run.passed(max(joined, schedule.n_layers - 1), run.end)
        if run.beginning is not None:
            own.branched += size
            own.not_again += size * run.passed(run.first_blocks[0], joined)


def _count_clean(own: Counts, batches: Iterable[CleanGroup]) -> None:
    for batch in batches:
        own.evaluations += len(batch.images) * batch.stop.blocks
        own.launches += 1
        own.widest = max(own.widest, len(batch.images))
        for column, examples in batch.by_column():
            own.images[column, batch.stop.blocks] += len(examples)


def _again(schedule: Schedule) -> int:
    """Images that pass through the model once more in every chunk that needs them but one."""
    if len(schedule.chunks) == 1 or schedule.holds or not schedule.needs.common.needs:
        return 0
    images = [schedule.needs.common.images(schedule.needs.of(chunk)) for chunk in schedule.chunks]
    return sum(map(len, images)) - len(np.unique(np.concatenate(images)))


def _spared(
    schedule: Schedule, segments: list[Segment], shares: dict[str, float], tokens: tuple[int, ...] | None
) -> float:
    found = distinct_rows(segments, [schedule.sharing.images_of] * len(segments))
    few = 1.0 if tokens is None or schedule.by_output is None else len(tokens) / schedule.by_output.n_tokens
    narrowed = PARTS[PARTS.index("attn.z") :]
    total = 0.0
    for layer, parts in found.items():
        for part, rows in parts.items():
            last = layer == schedule.n_layers - 1 and part in narrowed
            total += shares[part] * (few if last else 1.0) * (len(rows.index) - len(rows.first))
    return total


def _naive(bound: Bound, n_layers: int) -> int:
    """Blocks per example for one run at a time, each with its own base and source forwards."""
    cost: dict[str, int] = {}
    for run in sources_first([run.run for run in bound.runs]):
        sources = {source_of(spec) for spec in run.interventions} - {None}
        ablations = (spec for spec in run.interventions if isinstance(spec, Ablate))
        reading = filter(_reads_other_images, ablations)
        others = {spec.seed if spec.method == "resample" else "mean" for spec in reading}
        forwards = 1 + len(others) + sum(1 for source in sources if isinstance(source, str))
        runs = sum(cost[source.run] for source in sources if isinstance(source, RunSource))
        cost[run.name] = n_layers * forwards + runs
    return sum(cost.values())


def _reads_other_images(ablation: Ablate) -> bool:
    """Whether an ablation puts in what forwards of other images give."""
    return ablation.method == "resample" or (ablation.method == "mean" and ablation.mean is None)
