"""Carry out an experiment: bind its runs, schedule the work, do it, and hand over the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.engine.backends import Backend, backend_named
from vit_mechinterp.engine.binding.checks import (
    check_arguments,
    check_folder,
    check_progress,
    refuse_train_mode,
)
from vit_mechinterp.engine.binding.experiment import BoundExperiment, bind_experiment
from vit_mechinterp.engine.binding.identity import identity_of
from vit_mechinterp.engine.forwards.chunk import Setting
from vit_mechinterp.engine.forwards.clean import CleanPass, PlainClean, Tick
from vit_mechinterp.engine.forwards.exhaustion import in_fewer_rows
from vit_mechinterp.engine.forwards.held import HeldClean
from vit_mechinterp.engine.planning.describe import describe
from vit_mechinterp.engine.results.begun import Begun
from vit_mechinterp.engine.results.provenance import circumstances, provenance_of
from vit_mechinterp.engine.results.results import Results
from vit_mechinterp.engine.results.resume import FinishedChunks
from vit_mechinterp.engine.scheduling.cutting import schedule_for
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.scheduling.sizes import parse_bytes
from vit_mechinterp.engine.store.clean import StoredClean
from vit_mechinterp.engine.work import Work
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.heap import keeping, thrifty
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Experiment, Readout, Run, Sweep

if TYPE_CHECKING:
    from vit_mechinterp.engine.store import ActivationStore

__all__ = ["execute"]

_PROGRESS_DELAY = 2.0
"""Seconds after which a progress bar appears."""

_BACKEND_BATCH = 32
"""Most images in one forward of a backend, if nothing is said."""


def execute(
    vit: HookedViT,
    runs: Run | Sweep | Experiment | Iterable[Run | Sweep],
    data: Any,
    tensors: Mapping[str, Tensor] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    progress: bool = True,
    memory: int | str | None = None,
    store: ActivationStore | None = None,
    out: str | Path | None = None,
    backend: str | None = None,
    readout: Readout | None = None,
) -> Results:
    """Carry out runs on every example of a dataset.

    Blocks below every edit of a batch are skipped: they hand on a blank row. Forward hooks of your own on
    those blocks still fire, and see that row instead of an image. Where hooks or modules of your own are
    anywhere in the model, all tokens of the last block are computed, also those that the output does not
    read.

    Args:
        vit: the model, in eval mode (or without dropout).
        runs: runs, sweeps or an experiment.
        data: a ``datasets.Dataset`` or a mapping of columns.
        tensors: tensors that specs refer to by name.
        batch_size: most rows in one forward, or ``"auto"``. The same batch size, device and threads give the
            same bits; others agree to 1e-5 of the output's scale.
        progress: show a bar if it takes longer than two seconds.
        memory: most bytes that the engine may hold beside the model and the results, or a text such as
            ``"4GiB"``; 2 GiB on a CPU, 40 % of what is free on a GPU by default.
        store: where clean values are read from if they are there, and kept if they are not. With it, clean
            forwards hold fixed batches of one column's distinct images, so that a value has the same bits
            whether it is read or computed; an image that stands in two columns is computed for each, unless
            one of them holds all images of the other, and all that is read of them.
        out: a folder to write results into as they come, chunk by chunk. The same call with a folder that
            was begun goes on where it was, repeats nothing that is there, and gives the same bits; what
            captures hold is then mapped from the folder's ``results.safetensors``.
        backend: ``"hooks"``, ``"nnsight"``, ``"pyvene"`` or ``"transformer_lens"`` to carry the runs out
            there, one at a time, with at most ``batch_size`` images per forward; a backend takes neither
            memory, store nor out.
        readout: what is kept of every output: `vit_mechinterp.CrossEntropy` or
            `vit_mechinterp.SelectedLogits`, in place of an experiment's own; all of it by default. Whole
            outputs are there until their chunk of examples is done, and, of clean images, in a store.

    Returns:
        Outputs ``[run, example, *output]`` of the runs that have one (see `Run`), or with a readout
        ``[run, example]`` (a loss) or ``[run, example, k]`` (logits of k classes), and captures, on the CPU.

    Raises:
        SpecError, DataError, TensorFileError: before the first forward, if anything does not fit.
        ExecutionError: an intervention did not fire, the model would drop activations at random or has no
            weights, or ``out`` holds another experiment (what differs is named) or cannot be written.
    """
    check_arguments(vit, store)
    check_folder(out, "out")
    check_progress(progress)
    carry_out = None if backend is None else _alone(backend, memory, store, out)
    refuse_train_mode(vit)
    asked = bind_experiment(vit, runs, data, tensors, batch_size, readout, progress=progress)
    if carry_out is not None:
        return _elsewhere(carry_out, vit, asked, progress)
    with keeping() if memory is None else thrifty():
        schedule = schedule_for(
            vit,
            asked.bound,
            asked.data,
            asked.batch_size,
            memory=memory,
            tensors=asked.tensors,
            measure=True,
            progress=progress,
            stored=store is not None,
        )
        kept: FinishedChunks | None = None
        if out is not None:
            identity = identity_of(vit, asked.examples, asked.bound, asked.given)
            now = {**circumstances(vit), "use of a store": store is not None}
            begun = Begun(out, identity, now, schedule)
            if (results := begun.finished()) is not None:
                return results
            schedule, kept = begun.schedule, FinishedChunks(begun)
        return _carried_out(vit, asked, schedule, kept, memory, store, progress)


def _alone(
    backend: str, memory: int | str | None, store: ActivationStore | None, out: str | Path | None
) -> Backend:
    """A backend, which goes with no option that is the engine's."""
    carry_out = backend_named(backend)
    if (memory, store, out) != (None, None, None):
        raise SpecError(
            f"backend={backend!r} computes everything anew and holds nothing, so memory, store and out do "
            "not go with it. Leave them out, or the backend."
        )
    return carry_out


def _elsewhere(carry_out: Backend, vit: HookedViT, asked: BoundExperiment, progress: bool) -> Results:
    """The results of a backend."""
    data, width = asked.examples, _BACKEND_BATCH if asked.batch_size == "auto" else asked.batch_size

    def results(rows: int) -> Results:
        return carry_out(vit, asked.bound, data, asked.given, batch_size=rows, progress=progress)

    return in_fewer_rows(results, min(width, data.n))


def _carried_out(
    vit: HookedViT,
    asked: BoundExperiment,
    schedule: Schedule,
    kept: FinishedChunks | None,
    memory: int | str | None,
    store: ActivationStore | None,
    progress: bool,
) -> Results:
    """The results of a schedule, of which some may be kept from before."""
    data = asked.examples
    clean: CleanPass = HeldClean(schedule) if schedule.holds else PlainClean()
    if store is not None:
        clean = StoredClean(store.tiers, vit, data, schedule, asked.batch_size)
        if kept is not None:
            clean.decide(kept.begun.decided("store", clean.decisions))
    budget = None if memory is None else parse_bytes(memory)
    with vit.lock, torch.no_grad(), _Bar(vit, schedule, clean, progress) as tick:
        work = Work(Setting(vit, data, asked.given, clean, tick), schedule, kept, budget)
        work.carry_out()
    if store is not None:
        store.flush()
    labels = data.labels()
    provenance = provenance_of(vit, data, schedule, asked.given, work.halvings)
    if isinstance(clean, StoredClean):
        provenance["images_per_stored_forward"] = clean.decisions["rows"]
    return work.collected.results(labels, provenance) if kept is None else kept.finish(labels, provenance)


class _Bar:
    """A progress bar over (row, block) pairs, shown after two seconds."""

    def __init__(self, vit: HookedViT, schedule: Schedule, clean: CleanPass, progress: bool) -> None:
        total = None
        if progress:
            forecast = clean.forecast(schedule) if isinstance(clean, StoredClean) else None
            total = describe(vit, schedule, per_example=False, forecast=forecast).block_evaluations
        self._bar = tqdm(
            total=total,
            desc="interventions",
            unit="block",
            unit_scale=True,
            delay=_PROGRESS_DELAY,
            disable=not progress,
        )

    def __enter__(self) -> Tick:
        return self._bar.update

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
