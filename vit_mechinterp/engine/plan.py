"""The plan: what an experiment will compute, as an immutable, printable, tensor-free value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from vit_mechinterp.engine.bind import bind, expand_runs, sources_first
from vit_mechinterp.engine.bound import Bound
from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.schedule import Schedule
from vit_mechinterp.engine.values import ColumnOrigin, Read
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Experiment, Run, RunSource, Sweep

__all__ = ["CleanForwards", "Plan", "Rows", "describe", "plan", "schedule_for"]


@dataclass(frozen=True)
class CleanForwards:
    """Clean forwards of one image column: how many images pass through how many blocks, and what is kept."""

    column: str
    images: int
    blocks: int
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Rows of one run: where they join, what is edited, how many blocks each passes through."""

    run: str
    stage: int
    joins: str
    edits: tuple[str, ...]
    blocks: int


@dataclass(frozen=True)
class Plan:
    """What will be computed. ``n_examples`` is None for a plan made without data: all counts are per example.

    ``block_evaluations`` counts (row, block) pairs, clean ones included; ``naive_block_evaluations`` what one
    run at a time would need, with every source and base forward run anew. ``peak_bytes`` is an estimate of
    what the engine holds at most beside the model, and ``launches`` the number of forwards of the native
    module. ``width`` is the most rows that one forward may hold, ``widest`` the most that one does;
    ``clean_runs`` have no edits, so clean forwards answer them.
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
            f"{_counted(self.widest, 'row')} each, about {_human(self.peak_bytes)} at the peak",
            "  clean forwards",
        ]
        for forward in self.clean:
            lines.append(
                f"    {forward.column}: {forward.images} x {_counted(forward.blocks, 'block')}, keeps "
                f"{_listed(forward.kept)}"
            )
        if not self.clean:
            lines.append("    none")
        if self.clean_runs:
            lines.append(
                f"  runs without edits, answered by clean forwards: {_listed(self.clean_runs, 'runs')}"
            )
        for stage in sorted({rows.stage for rows in self.rows}):
            lines.append(f"  rows that join one growing batch{f' (stage {stage + 1})' if stage else ''}")
            for rows in (r for r in self.rows if r.stage == stage):
                lines.append(
                    f"    {rows.run}: joins at {rows.joins}, {_counted(rows.blocks, 'block')}; "
                    f"{', '.join(rows.edits)}"
                )
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
    batch_size: int | Literal["auto"] = "auto",
) -> Plan:
    """Say what `execute` will compute, without computing it.

    Args:
        vit: the model.
        runs: runs, sweeps or an experiment.
        data: the examples; without them the plan is per example, and columns are not checked.
        batch_size: most rows in one forward, or ``"auto"``.

    Raises:
        SpecError: a run does not fit the model; DataError: the data lacks what a run reads.
    """
    if isinstance(runs, Experiment) and batch_size == "auto":
        batch_size = runs.batch_size
    flat = expand_runs(runs, vit.layout.n_layers)
    columns = None if data is None else Data(data, vit)
    bound = bind(vit, flat, columns)
    schedule = schedule_for(vit, bound, None if columns is None else columns.n, batch_size)
    return describe(vit, schedule, per_example=columns is None)


def schedule_for(
    vit: HookedViT, bound: Bound, n_examples: int | None, batch_size: int | Literal["auto"]
) -> Schedule:
    """Choose chunk and width: rows by throughput, examples by the bytes that their clean values take."""
    if batch_size != "auto" and not (hasattr(batch_size, "__index__") and batch_size > 0):
        raise SpecError(f"batch_size is 'auto' or a positive integer, got {batch_size!r}.")
    n = n_examples or 1
    width = _width(vit) if batch_size == "auto" else int(batch_size)
    draft = Schedule(bound, vit.layout.n_layers, n, 1, width, vit.layout.family.one_image)
    per_example = sum(_read_bytes(vit, read) for read in draft.clean_reads)
    chunk = max(1, min(n, width, _CLEAN_BUDGET // max(1, per_example)))
    return replace(draft, chunk=chunk)


_CLEAN_BUDGET = 2 * 1024**3
"""Bytes of clean values held at once."""


def _width(vit: HookedViT) -> int:
    """Rows per forward: on a CPU what keeps one activation within its cache, on a GPU what memory allows."""
    tokens, d_model = vit.layout.tokens.n_tokens, vit.layout.d_model
    if vit.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(vit.device)
        return max(1, min(1024, int(0.4 * free) // _row_bytes(vit, explicit=True)))
    return max(4, 2**20 // (tokens * d_model))


def _row_bytes(vit: HookedViT, *, explicit: bool) -> int:
    tokens, d_model, heads = vit.layout.tokens.n_tokens, vit.layout.d_model, vit.layout.n_heads
    widths = [info.shape[-1] for name, info in vit.sites().items() if name.endswith("mlp.pre")]
    per_token = 8 * d_model + 2 * max(widths, default=4 * d_model)
    attention = 3 * heads * tokens * tokens if explicit else 0
    return (tokens * per_token + attention) * torch.finfo(vit.dtype).bits // 8


def _read_bytes(vit: HookedViT, read: Read) -> int:
    size = 1
    for n in vit.sites()[str(read.site)].shape:
        size *= n
    if not read.positions.is_all:
        selected = read.positions.shared or max(read.positions.each or ((0,),), key=len)
        size = size * len(selected) // vit.layout.tokens.n_tokens
    return size * torch.finfo(vit.dtype).bits // 8


def describe(vit: HookedViT, schedule: Schedule, *, per_example: bool) -> Plan:
    """Count what a schedule computes."""
    bound, n_layers = schedule.bound, schedule.n_layers
    clean: list[CleanForwards] = []
    evaluations = launches = 0
    passes: list[tuple[tuple[Read, ...] | None, tuple[str, ...]]] = [(None, schedule.columns)]
    if schedule.means_come_first:
        passes.insert(0, (schedule.mean_reads, schedule.columns_of(schedule.mean_reads)))
    for reads, columns in passes:
        for column in columns:
            images = [len(schedule.images(column, chunk, reads)) for chunk in schedule.chunks]
            blocks = schedule.stop(column, reads).blocks(n_layers)
            evaluations += sum(images) * blocks
            launches += sum(-(-n // schedule.clean_width) for n in images)
            kept = dict.fromkeys(str(read.site) for read in schedule.reads_of(column, reads))
            if reads is None and column in schedule.outputs:
                kept[vit.layout.output] = None
            clean.append(CleanForwards(column, sum(images), blocks, tuple(kept)))
    rows: list[Rows] = []
    widest = 0
    for number, stage in enumerate(bound.stages):
        for run in stage:
            join = run.join(n_layers)
            edits = tuple(f"{edit.spec.op} at {edit.site}" for edit in run.edits)
            place = f"the output of block {join.layer}" if join.behind else f"the input of block {join.layer}"
            rows.append(Rows(run.name, number, place, edits, n_layers - join.first_block))
        for chunk in schedule.chunks:
            for wave in schedule.waves(stage, chunk):
                evaluations += schedule.wave_blocks(wave)
                launches += 1
                widest = max(widest, sum(len(s.examples) for s in wave))
    most = max([widest, *(min(c.images, schedule.clean_width) for c in clean)])
    explicit = any(e.site.is_attention_matrix for r in bound.runs for e in r.edits)
    held = schedule.chunk * sum(_read_bytes(vit, read) for read in schedule.clean_reads)
    return Plan(
        model=type(vit.module).__name__,
        n_layers=n_layers,
        n_examples=None if per_example else schedule.n_examples,
        chunk=schedule.chunk,
        width=schedule.width,
        widest=most,
        clean_runs=tuple(run.name for run in bound.runs if not run.edits),
        clean=tuple(clean),
        rows=tuple(rows),
        block_evaluations=evaluations,
        naive_block_evaluations=_naive(bound, n_layers) * schedule.n_examples,
        launches=launches,
        peak_bytes=held + most * _row_bytes(vit, explicit=explicit),
        notes=tuple(_notes(schedule)),
    )


def _naive(bound: Bound, n_layers: int) -> int:
    """Blocks per example for one run at a time, each with its own base and source forwards."""
    by_name = {run.name: run for run in bound.runs}
    cost: dict[str, int] = {}
    for spec in sources_first([run.run for run in bound.runs]):
        edits = by_name[spec.name].edits
        sources = {getattr(edit.spec, "source", None) for edit in edits} - {None}
        permuted_or_mean = {(e.source or e.mean) for e in edits if e.spec.op == "ablate"} - {None}
        forwards = 1 + len(permuted_or_mean) + sum(1 for s in sources if isinstance(s, str))
        cost[spec.name] = n_layers * forwards + sum(cost[s.run] for s in sources if isinstance(s, RunSource))
    return sum(cost.values())


def _notes(schedule: Schedule) -> Iterable[str]:
    if schedule.one_image is not None:
        yield f"clean forwards take one image each: {schedule.one_image}"
    if schedule.means_come_first:
        yield "dataset means need a pass of their own, because the dataset spans several chunks"
    if len(schedule.chunks) > 1:
        permuted = {
            r.origin.column
            for r in schedule.clean_reads
            if isinstance(r.origin, ColumnOrigin) and r.origin.permutation is not None
        }
        for column in sorted(permuted):
            yield f"resampled images of {column!r} lie in other chunks, so some pass through the model again"
    if len(schedule.bound.stages) > 1:
        yield "runs that read other edited runs wait for them, in stages of one growing batch each"
    late = [r for r in schedule.bound.runs if r.first and _late_start(r.first.name, through=r.through)]
    if late:
        names = ", ".join(sorted({str(r.first) for r in late})[:4])
        yield (
            f"edits inside a block ({names}) join at its input, so the part of the block before them "
            "runs again"
        )


def _late_start(name: str, *, through: bool) -> bool:
    early = ("embed", "resid_pre", "ln1", "resid_post", "ln_final", "pooled", "logits")
    return name not in early and (through or name != "mlp_out")


def _listed(names: tuple[str, ...], what: str = "sites") -> str:
    return ", ".join(names[:6]) + (f", ... ({len(names)} {what})" if len(names) > 6 else "")


def _counted(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _human(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    raise AssertionError
