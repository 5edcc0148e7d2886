"""Carry out a plan: bound runs in, results out. The only part that installs hooks for an experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.engine.bind import bind, expand_runs
from vit_mechinterp.engine.bound import Bound
from vit_mechinterp.engine.chunk import Collected, chunk_of
from vit_mechinterp.engine.clean import dataset_means
from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.plan import describe, schedule_for
from vit_mechinterp.engine.provenance import provenance_of
from vit_mechinterp.engine.results import Captures, Results
from vit_mechinterp.engine.schedule import Schedule
from vit_mechinterp.engine.tensors import check_tensors, resolve_refs
from vit_mechinterp.engine.values import Read, by_token
from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Experiment, Run, Sweep, TensorRef

__all__ = ["execute"]

_PROGRESS_DELAY = 2.0
"""Seconds after which a progress bar appears."""

Tick = Callable[[int], None]


def execute(
    vit: HookedViT,
    runs: Run | Sweep | Experiment | Iterable[Run | Sweep],
    data: Any,
    tensors: Mapping[str, Tensor] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    progress: bool = True,
) -> Results:
    """Carry out runs on every example of a dataset.

    Blocks below every edit of a batch are skipped: they hand on a blank row. Forward hooks of your own on
    those blocks still fire, and see that row instead of an image.

    Args:
        vit: the model, in eval mode (or without dropout).
        runs: runs, sweeps or an experiment.
        data: a ``datasets.Dataset`` or a mapping of columns.
        tensors: tensors that specs refer to by name.
        batch_size: most rows in one forward, or ``"auto"``. The same batch size, device and threads give the
            same bits; others agree to 1e-5 of the output's scale.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Outputs ``[run, example, *output]`` and captures, on the CPU.

    Raises:
        SpecError, DataError, TensorFileError: before the first forward, if anything does not fit.
        ExecutionError: an intervention did not fire, or the model would drop activations at random.
    """
    folder = runs.folder if isinstance(runs, Experiment) else None
    if isinstance(runs, Experiment) and batch_size == "auto":
        batch_size = runs.batch_size
    files = dict(runs.tensors) if isinstance(runs, Experiment) else {}
    flat = expand_runs(runs, vit.layout.n_layers)
    refuse_dropout(vit)
    columns = Data(data, vit, progress=progress)
    bound = bind(vit, flat, columns)
    resolved = resolve_refs(bound, tensors, vit, folder, files)
    check_tensors(bound, resolved, vit, columns.n)
    schedule = schedule_for(vit, bound, columns.n, batch_size)
    check_images(columns, bound)
    with vit.lock, torch.no_grad(), _Bar(vit, schedule, progress) as tick:
        collected, halvings = _with_halving(vit, columns, schedule, resolved, tick)
    return _results(vit, columns, schedule, resolved, collected, halvings)


def refuse_dropout(vit: HookedViT) -> None:
    """Raise ExecutionError if the model is in train mode and would drop activations at random."""
    path = vit.dropout()
    if path is not None:
        raise ExecutionError(
            f"{type(vit.module).__name__} is in train mode and would drop activations at random (at {path}), "
            "so no two forwards could be compared. Call module.eval() first."
        )


def check_images(data: Data, bound: Bound) -> None:
    """Raise DataError before the first forward if an image column holds something else."""
    for column in sorted(bound.image_columns):
        data.check_images(column)


class _Bar:
    """A progress bar over (row, block) pairs, shown after two seconds."""

    def __init__(self, vit: HookedViT, schedule: Schedule, progress: bool) -> None:
        total = describe(vit, schedule, per_example=False).block_evaluations
        self._bar = tqdm(
            total=total,
            desc="interventions",
            unit="block",
            unit_scale=True,
            delay=_PROGRESS_DELAY,
            disable=not progress,
        )

    def __enter__(self) -> Tick:
        def tick(n: int) -> None:
            self._bar.update(n)

        return tick

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


def _with_halving(
    vit: HookedViT, data: Data, schedule: Schedule, tensors: Mapping[TensorRef, Tensor], tick: Tick
) -> tuple[Collected, int]:
    """Run every chunk; where memory runs out, halve the rows per forward and do the chunk again."""
    collected = Collected(schedule.bound)
    halvings = 0
    means: dict[Read, Tensor] | None = None
    while means is None:
        with suppress(torch.OutOfMemoryError):
            means = dataset_means(vit, data, schedule, tick) if schedule.means_come_first else {}
        if means is None:
            # Out here the failed forward's frames are gone, and its memory with them.
            schedule, halvings = _halved(schedule), halvings + 1
    for chunk in schedule.chunks:
        part: Collected | None = None
        while part is None:
            with suppress(torch.OutOfMemoryError):
                part = chunk_of(vit, data, schedule, chunk, tensors, means, tick)
            if part is None:
                schedule, halvings = _halved(schedule), halvings + 1
        for run, output in part.outputs.items():
            collected.outputs[run] += output
        for key, pieces in part.captures.items():
            collected.captures.setdefault(key, []).extend(pieces)
    return collected, halvings


def _halved(schedule: Schedule) -> Schedule:
    if schedule.width == 1:
        raise ExecutionError(
            "Out of memory with one row per forward: the model does not fit with its activations."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return replace(schedule, width=max(1, schedule.width // 2))


def _results(
    vit: HookedViT,
    data: Data,
    schedule: Schedule,
    tensors: Mapping[TensorRef, Tensor],
    collected: Collected,
    halvings: int,
) -> Results:
    runs = schedule.bound.runs
    captures = {
        run.name: Captures(
            run.name, {c.name: _capture(c.read, collected.captures[run.name, c.name]) for c in run.captures}
        )
        for run in runs
    }
    return Results(
        logits=torch.stack([torch.cat(collected.outputs[run.name]) for run in runs]),
        run_names=tuple(run.name for run in runs),
        captures=captures,
        labels=data.labels(),
        provenance=provenance_of(vit, data, schedule, tensors, halvings),
    )


def _capture(read: Read, pieces: list[tuple[Tensor, list[int] | None]]) -> Tensor | list[Tensor]:
    """Captured rows in the site's own axis order; a list where examples differ in their number of tokens."""
    if pieces[0][1] is None:
        return by_token(read.site, torch.cat([tensor for tensor, _ in pieces])).contiguous()
    counts = [count for _, own in pieces for count in (own or ())]
    rows = torch.cat([tensor for tensor, _ in pieces])
    if len(set(counts)) == 1:
        return by_token(read.site, rows.reshape(-1, counts[0], *rows.shape[1:])).contiguous()
    parts = torch.split(rows, counts)
    return [
        part.transpose(0, 1).contiguous() if read.site.is_attention_matrix else part.contiguous()
        for part in parts
    ]
