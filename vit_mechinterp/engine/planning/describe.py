"""How plans are made: what a schedule amounts to, counted and put into words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from vit_mechinterp.engine.binding.bound import BoundRun
from vit_mechinterp.engine.binding.checks import check_arguments
from vit_mechinterp.engine.binding.experiment import bind_experiment
from vit_mechinterp.engine.binding.values import Read, origin_of
from vit_mechinterp.engine.planning.counting import Way, count
from vit_mechinterp.engine.planning.notes import notes_on
from vit_mechinterp.engine.planning.plan import CleanForwards, Plan, PlannedRows
from vit_mechinterp.engine.rows.ending import ends_of
from vit_mechinterp.engine.rows.numbering import Part
from vit_mechinterp.engine.scheduling.cutting import schedule_for
from vit_mechinterp.engine.scheduling.footprint import footprint
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.store.arrangement import Forecast
from vit_mechinterp.engine.store.clean import StoredClean
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.heap import uncollected
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Experiment, Readout, Run, Sweep

if TYPE_CHECKING:
    from vit_mechinterp.engine.store import ActivationStore

__all__ = ["describe", "plan"]


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
    block at every call, and in that block once. Nothing is measured: how many rows are quickest together is
    what was measured before, or what is likely, and where `execute` measures it, launches and chunks may
    differ.

    Args:
        vit: the model.
        runs: runs, sweeps or an experiment.
        data: the examples; without them the plan is per example, and columns are not checked.
        tensors: tensors that specs refer to by name; where all are known, directions and gates of zeros are
            found.
        batch_size: most rows in one forward, or ``"auto"``.
        memory: most bytes to hold beside the model, or a text such as ``"4GiB"``; by default as in
            `execute`.
        store: what the experiment will be given as its store; what it has is not computed. It needs data.
        readout: what will be kept of every output, as for `execute`.

    Returns:
        Counts of forwards, (row, block) pairs and bytes, and where every run's rows join; ``print`` shows it.

    Raises:
        SpecError: a run or the readout does not fit the model, or a store is given without data.
        DataError: the data lacks what a run or the readout reads, or holds images that the model cannot take.
        TensorFileError: a file of tensors cannot be read.
        ExecutionError: the model stands on the meta device, and tensors or a store are given.
    """
    if store is not None and data is None:
        raise SpecError(
            "What a store has depends on the images, and this plan has no data. Give plan the data too, or "
            "no store."
        )
    check_arguments(vit, store, planned=store is None)
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
    clean, home = [], str if forecast is None else forecast.homes.of
    for (column, blocks), images in counts.images.items():
        own = (need for need in counts.needs if home(origin_of(need).column) == column)
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


def _rows_of(part: Part, ways: Mapping[Way, int], stage: int, schedule: Schedule) -> Iterator[PlannedRows]:
    """Rows of a run on which the same edits act, by where they join and end; ``ways`` counts those that are
    computed."""
    edits = tuple(f"{edit.spec.op} at {edit.site}" for edit in part.run.edits)
    for beginning, ends in ways or ((None, ends_of(schedule.bound, ()).get(part.run.name)),):
        run = replace(part.run, beginning=beginning, ends=ends)
        n = ways[beginning, ends] if len(ways) > 1 else len(part.examples)
        some = n if n < schedule.n_examples else None
        yield PlannedRows(run.name, stage, _joins(run), edits, run.passes, some)


def _joins(run: BoundRun) -> str:
    """Where rows of a run join, in words."""
    join, beginning = run.join, run.beginning
    place = f"the {'output' if join.behind else 'input'} of block {join.layer}"
    if beginning is None:
        return place
    made = "its first edit" if beginning.made == 1 else f"its first {beginning.made} edits"
    return f"{place}, from rows that have {made}"
