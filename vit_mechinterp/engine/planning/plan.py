"""The plan: what an experiment will compute, as an immutable, printable, tensor-free value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from vit_mechinterp.engine.binding.bound import BoundRun
from vit_mechinterp.engine.binding.checks import check_arguments
from vit_mechinterp.engine.binding.experiment import bind_experiment
from vit_mechinterp.engine.binding.values import Read, origin_of
from vit_mechinterp.engine.planning.counting import Way, count
from vit_mechinterp.engine.planning.notes import notes_on
from vit_mechinterp.engine.rows.ending import ends_of
from vit_mechinterp.engine.rows.numbering import Part
from vit_mechinterp.engine.scheduling.cutting import schedule_for
from vit_mechinterp.engine.scheduling.footprint import footprint
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.scheduling.sizes import in_words
from vit_mechinterp.engine.store.clean import Forecast, StoredClean
from vit_mechinterp.errors import SpecError, listed
from vit_mechinterp.model.heap import uncollected
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Experiment, Readout, Run, Sweep

if TYPE_CHECKING:
    from vit_mechinterp.engine.store import ActivationStore

__all__ = ["CleanForwards", "Plan", "Rows", "describe", "plan"]


@dataclass(frozen=True)
class CleanForwards:
    """Clean forwards of one image column: how many images pass through how many blocks, and what is kept.

    An image that stands in several columns counts in one of them; with a store, in each.
    """

    column: str
    images: int
    blocks: int
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Rows of one run: where they join, what is edited, how many blocks each passes through, and for how many
    examples (None for all of them). Rows that are equal to others join where these do."""

    run: str
    stage: int
    joins: str
    edits: tuple[str, ...]
    blocks: int
    examples: int | None = None


@dataclass(frozen=True)
class Plan:
    """What will be computed. ``n_examples`` is None for a plan made without data: all counts are per example.

    ``block_evaluations`` counts (row, block) pairs, clean ones included; ``naive_block_evaluations`` what one
    run at a time would need, in whole forwards, with every source and base forward run anew. ``spared`` is
    the part of these pairs, in blocks' worth of work, that rows share inside the blocks where they join,
    ``unread`` the part that nobody reads: tokens behind the last attention call. ``peak_bytes`` bounds what
    the engine holds beside the model while it computes, ``result_bytes`` is what it hands over, and
    ``launches`` the number of forwards of the native module, beside the few small ones that find out what
    the output reads. ``width`` is the most rows that one forward may
    hold, ``widest`` the most that one does; ``clean_runs`` are changed by no edit, so clean forwards answer
    them, as they answer ``clean_rows`` rows of other runs; ``shared_rows`` are equal to rows that are
    computed.
    """

    model: str
    n_layers: int
    n_examples: int | None
    chunk: int
    width: int
    widest: int
    clean_runs: tuple[str, ...]
    clean: tuple[CleanForwards, ...]
    rows: tuple[Rows, ...]
    block_evaluations: int
    naive_block_evaluations: int
    launches: int
    peak_bytes: int
    notes: tuple[str, ...]
    spared: float = 0.0
    unread: float = 0.0
    result_bytes: int = 0
    shared_rows: int = 0
    clean_rows: int = 0

    @property
    def forwards(self) -> float:
        """Block evaluations as a number of whole forwards."""
        return self.block_evaluations / self.n_layers

    @property
    def naive_forwards(self) -> float:
        """Forwards that one run at a time would need."""
        return self.naive_block_evaluations / self.n_layers

    def __str__(self) -> str:
        per = "per example" if self.n_examples is None else f"for {_counted(self.n_examples, 'example')}"
        lines = [
            f"Plan {per} on {self.model} ({_counted(self.n_layers, 'block')})",
            f"  {self.forwards:.4g} forwards' worth of blocks "
            f"({_counted(self.block_evaluations, 'block evaluation')}) instead of "
            f"{self.naive_forwards:.4g} ({self.naive_block_evaluations})",
            f"  {_counted(self.launches, 'launch', 'launches')}, {self._chunks()}, at most "
            f"{_counted(self.widest, 'row')} each, at most {in_words(self.peak_bytes)} beside the model and "
            f"results of {in_words(self.result_bytes)}",
            "  clean forwards",
        ]
        for forward in self.clean:
            lines.append(
                f"    {forward.column}: {forward.images} x {_counted(forward.blocks, 'block')}, keeps "
                f"{listed(forward.kept, most=6)}"
            )
        if not self.clean:
            lines.append("    none")
        if self.clean_runs:
            lines.append(f"  runs that clean forwards answer: {listed(self.clean_runs, most=6)}")
        if self.clean_rows:
            lines.append(
                f"  {_counted(self.clean_rows, 'row')} of other runs that no edit changes, answered by clean "
                "forwards"
            )
        if self.shared_rows:
            lines.append(f"  {_counted(self.shared_rows, 'row')} equal to others, computed once")
        if self.spared > 0:
            lines.append(
                f"  of the block evaluations, {self.spared:.4g} blocks' worth is spared inside blocks where "
                "rows of one image join"
            )
        if self.unread > 0:
            lines.append(
                f"  of the block evaluations, {self.unread:.4g} blocks' worth is left out of the last block, "
                "behind whose attention most tokens are not read"
            )
        for stage in sorted({rows.stage for rows in self.rows}):
            lines.append(f"  rows that join one growing batch{f' (stage {stage + 1})' if stage else ''}")
            # Runs of a sweep that differ in tokens, heads or examples alone are one line.
            alike: dict[str, list[str]] = {}
            for rows in (r for r in self.rows if r.stage == stage):
                some = "" if rows.examples is None else f" for {_counted(rows.examples, 'example')}"
                how = f"at {rows.joins}, {_counted(rows.blocks, 'block')}; {', '.join(rows.edits)}{some}"
                alike.setdefault(how, []).append(rows.run)
            for how, names in alike.items():
                verb = "joins" if len(names) == 1 else "join"
                lines.append(f"    {listed(names, most=6)}: {verb} {how}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _chunks(self) -> str:
        if self.n_examples is None:
            return "one chunk"
        count = -(-self.n_examples // self.chunk)
        return f"{_counted(count, 'chunk')} of up to {_counted(self.chunk, 'example')}"


def plan(
    vit: HookedViT,
    runs: Run | Sweep | Experiment | Iterable[Run | Sweep],
    data: Any = None,
    tensors: Mapping[str, Tensor] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    memory: int | str | None = None,
    store: ActivationStore | None = None,
    readout: Readout | None = None,
) -> Plan:
    """Say what `execute` will compute, without computing it.

    The model itself is run on a few random values to find out which tokens its output reads: behind its last
    block at every call, and in that block once.

    Args:
        vit: the model.
        runs: runs, sweeps or an experiment.
        data: the examples; without them the plan is per example, and columns are not checked.
        tensors: tensors that specs refer to by name; where all are known, directions and gates of zeros are
            found.
        batch_size: most rows in one forward, or ``"auto"``.
        memory: most bytes to hold beside the model, or a text such as ``"4GiB"``.
        store: what the experiment will be given as its store; what it has is not computed. It needs data.
        readout: what will be kept of every output, as for `execute`.

    Raises:
        SpecError: a run or the readout does not fit the model, or a store is given without data.
        DataError: the data lacks what a run or the readout reads, or holds images that the model cannot take.
        TensorFileError: a file of tensors cannot be read.
    """
    if store is not None and data is None:
        raise SpecError(
            "What a store has depends on the images, and this plan has no data. Give plan the data too, or "
            "no store."
        )
    check_arguments(vit, store)
    asked = bind_experiment(vit, runs, data, tensors, batch_size, readout, planned=True)
    schedule = schedule_for(
        vit,
        asked.bound,
        asked.data,
        asked.batch_size,
        memory=memory,
        tensors=asked.tensors,
        stored=store is not None,
    )
    forecast = None
    if store is not None:
        clean = StoredClean(store.tiers, vit, asked.examples, schedule, asked.batch_size)
        forecast = clean.forecast(schedule)
    known = asked.tensors is not None
    return describe(vit, schedule, per_example=asked.data is None, forecast=forecast, tensors_known=known)


@uncollected()
def describe(
    vit: HookedViT,
    schedule: Schedule,
    *,
    per_example: bool,
    forecast: Forecast | None = None,
    tensors_known: bool = True,
) -> Plan:
    """Count what a schedule computes; its clean forwards as a store foresees them, if there is one."""
    bound, n_layers = schedule.bound, schedule.n_layers
    counts = count(vit, schedule, forecast)
    clean = []
    for (column, blocks), images in counts.images.items():
        own = (need for need in counts.needs if origin_of(need).column == column)
        kept = dict.fromkeys(str(need.site) if isinstance(need, Read) else vit.layout.output for need in own)
        clean.append(CleanForwards(column, images, blocks, tuple(kept)))
    ways: defaultdict[tuple[int, int], dict[Way, int]] = defaultdict(dict)
    for (stage, part, way), times in counts.ways.items():
        ways[stage, part][way] = times
    rows = [
        row
        for number, parts in enumerate(schedule.sharing.parts_of_stages)
        for own in parts
        for row in _rows_of(own, ways[number, own.number], number, schedule)
    ]
    n, clean_rows = schedule.n_examples, schedule.sharing.clean_rows
    untouched = tuple(run.name for run in bound.runs if len(clean_rows(run.name)) == n)
    held = footprint(vit, schedule)
    return Plan(
        model=type(vit.module).__name__,
        n_layers=n_layers,
        n_examples=None if per_example else schedule.n_examples,
        chunk=schedule.chunk,
        width=schedule.width,
        widest=counts.widest,
        clean_runs=untouched,
        clean=tuple(clean),
        rows=tuple(rows),
        block_evaluations=counts.evaluations,
        naive_block_evaluations=counts.naive,
        launches=counts.launches,
        peak_bytes=held.peak(schedule.chunk, counts.widest),
        notes=tuple(notes_on(vit, schedule, counts, forecast, tensors_known=tensors_known)),
        spared=counts.spared,
        unread=counts.unread,
        result_bytes=held.result * schedule.n_examples,
        shared_rows=counts.shared,
        clean_rows=counts.clean - len(untouched) * n,
    )


def _rows_of(part: Part, ways: Mapping[Way, int], stage: int, schedule: Schedule) -> Iterator[Rows]:
    """Rows of a run on which the same edits act, by where they join and end; ``ways`` counts those that are
    computed."""
    edits = tuple(f"{edit.spec.op} at {edit.site}" for edit in part.run.edits)
    for beginning, ends in ways or ((None, ends_of(schedule.bound, ()).get(part.run.name)),):
        run = replace(part.run, beginning=beginning, ends=ends)
        n = ways[beginning, ends] if len(ways) > 1 else len(part.examples)
        some = n if n < schedule.n_examples else None
        blocks = run.end - run.join.first_block
        yield Rows(run.name, stage, _joins(run), edits, blocks, some)


def _joins(run: BoundRun) -> str:
    """Where rows of a run join, in words."""
    join, beginning = run.join, run.beginning
    place = f"the {'output' if join.behind else 'input'} of block {join.layer}"
    if beginning is None:
        return place
    made = "its first edit" if beginning.made == 1 else f"its first {beginning.made} edits"
    return f"{place}, from rows that have {made}"


def _counted(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
