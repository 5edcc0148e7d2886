"""Runs whose clean forwards are done, and how batches of several of them run together."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.engine.binding.bound import Bound, BoundRun
from vit_mechinterp.engine.binding.tensors import resolve_refs
from vit_mechinterp.engine.binding.values import ImagesOf, Read
from vit_mechinterp.engine.forwards.clean import Clean
from vit_mechinterp.engine.forwards.editing import Material
from vit_mechinterp.engine.forwards.exhaustion import in_fewer_rows
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.reduction.unread import union
from vit_mechinterp.engine.results.provenance import provenance_of
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.training.batch import Batch
from vit_mechinterp.engine.training.rows import TrainedRows, outputs_of, widest
from vit_mechinterp.errors import ExecutionError, SpecError, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TensorRef

__all__ = ["Prepared", "run_together"]


class Prepared:
    """Runs whose clean forwards are done; made by `prepare`.

    Attributes:
        is_open: whether the ``with`` block goes on that it was made for.
        n_examples: number of examples held.
        most_source_tokens: tokens in the largest source selection of any run and example; 0 without sources.
        clean_evaluations: (row, block) pairs that the clean forwards took.
        nbytes: bytes of clean values held; those that are read from a store batch by batch are not.
    """

    def __init__(
        self,
        vit: HookedViT,
        data: Data,
        schedule: Schedule,
        clean: Clean,
        means: Mapping[Read, Tensor],
        shapes: Mapping[TensorRef, tuple[int, ...]],
        clean_evaluations: int,
    ) -> None:
        self.vit = vit
        self.schedule = schedule
        self.is_open = True
        self._thread = threading.current_thread()
        self._data = data
        self._clean = clean
        self._means = means
        self._shapes = shapes
        self._runs = {run.name: run for run in schedule.bound.runs}
        self._source_tokens = {
            run.name: _most_source_tokens(vit, schedule, run) for run in schedule.bound.runs
        }
        self.n_examples = schedule.n_examples
        self.most_source_tokens = self.source_tokens(self.run_names)
        self.clean_evaluations = clean_evaluations
        self.nbytes = sum(values.nbytes for values in clean.values.values())

    def close(self) -> None:
        """Let go of all clean values."""
        self._clean, self.is_open = Clean(), False

    def refuse_other_threads(self) -> None:
        """Raise ExecutionError in a thread that did not enter the block: it would wait for the model, which
        is locked as long as the block lasts."""
        if threading.current_thread() is not self._thread:
            raise ExecutionError(
                "This preparation holds the model for the thread that entered its 'with prepare(...)' block, "
                f"{self._thread.name!r}, and is called in {threading.current_thread().name!r}. Call it in "
                "the former, or write the block in the latter."
            )

    @property
    def run_names(self) -> tuple[str, ...]:
        """Names of the runs, in the order of the outputs."""
        return tuple(self._runs)

    def source_tokens(self, runs: Sequence[str]) -> int:
        """Tokens in the largest source selection of some runs and any example; 0 without sources."""
        return max((self._source_tokens[name] for name in runs), default=0)

    def provenance(self) -> dict[str, Any]:
        """Digests of spec, model and data, device and versions, as `execute` gives them."""
        return provenance_of(self.vit, self._data, self.schedule, {}, halvings=0)

    def __call__(
        self,
        examples: Sequence[int],
        tensors: Mapping[str, Tensor],
        source_order: Sequence[int] | None = None,
    ) -> Float[Tensor, "run example *output"]:
        """Outputs of every run on some examples, in the ambient grad mode.

        Gradients flow to ``tensors`` and stop at the interventions: the clean part is constant. Outputs are
        float32, or float64 of a model that is. See `run_together` for batches of several preparations.

        Args:
            examples: which examples, in any order.
            tensors: tensors that the specs refer to by name; they may change from call to call. Their
                shapes are looked at, their numbers are not: what is orthonormal or finite is up to whoever
                trains them.
            source_order: the order in which every source selection's tokens are paired with the base's, a
                permutation of ``range(most_source_tokens)`` (for training DAS, Lepori et al. 2024); an
                example of fewer tokens leaves out those it lacks.

        Raises:
            SpecError: ``source_order`` is no such permutation, or ``examples`` names none or too high ones.
            ExecutionError: another thread entered the block; or see `run_together`.
        """
        return run_together([Batch(self, examples, source_order=source_order)], tensors)[0]

    def find(self, names: Sequence[str] | None) -> tuple[BoundRun, ...]:
        """Runs by name; all of them by default.

        Raises:
            SpecError: there is no such run, or none is named.
        """
        names = self.run_names if names is None else names
        for name in names:
            if name not in self._runs:
                raise SpecError(
                    f"No run {name!r} was prepared.{suggest(name, self._runs)} Prepared: "
                    f"{', '.join(self._runs)}."
                )
        if not names:
            raise SpecError("A batch names at least one run, or leaves runs out for all.")
        return tuple(self._runs[name] for name in names)

    def material(self, runs: Sequence[BoundRun], tensors: Mapping[str, Tensor]) -> Material:
        """What the rows of some runs read."""
        bound = Bound(runs=tuple(runs), stages=(tuple(runs),), run_reads=())
        refs = resolve_refs(bound, tensors, self.vit)
        for ref, tensor in refs.items():
            if tuple(tensor.shape) != self._shapes[ref]:
                raise SpecError(
                    f"Tensor {ref.name or ref.key!r} has shape {tuple(tensor.shape)}; it was prepared with "
                    f"{self._shapes[ref]}."
                )
        images_of = self.schedule.sharing.images_of
        return Material(bound, self._clean, refs, means=self._means, images_of=images_of)

    def clean_outputs(self, run: BoundRun, examples: Sequence[int]) -> Tensor:
        """Outputs of a run without interventions."""
        return self._clean.values[run.origin].whole(examples)


def run_together(
    batches: Iterable[Batch], tensors: Mapping[str, Tensor]
) -> list[Float[Tensor, "run example *output"]]:
    """Outputs of several batches in common growing batches, in the ambient grad mode.

    The batches may belong to several preparations of one model, on different data. Rows join at the block of
    their first intervention; forward and backward pass through the blocks behind it alone. On a GPU all rows
    share one growing batch; on a CPU, where very wide ones are slower, as few as `likely_width` allows.

    Args:
        batches: what to run.
        tensors: tensors that the specs of all batches refer to by name.

    Returns:
        Outputs of every batch: one row per run, in the batch's order.

    Raises:
        SpecError: a batch does not fit its preparation, or the preparations are of several models.
        ExecutionError: without gradients, one row does not fit into memory; or a batch is of a preparation
            whose block another thread entered.
        OutOfMemoryError: with gradients, for which what all rows leave behind is held; smaller batches, whose
            gradients add up, take less (`Batch.cut`).
    """
    is_list = isinstance(batches, Iterable) and not isinstance(batches, Batch)
    batches = list(batches) if is_list else []
    if not is_list or not all(isinstance(batch, Batch) for batch in batches):
        raise SpecError(
            "batches is a list of Batch(prepared, examples), also for one: run_together([batch], tensors)."
        )
    if not batches:
        return []
    vit = batches[0].prepared.vit
    if any(batch.prepared.vit is not vit for batch in batches):
        raise SpecError("Batches that run together are of one model; these were prepared on several.")
    runs_of = [batch.checked() for batch in batches]
    for batch in batches:
        batch.prepared.refuse_other_threads()
    images_of = _images_of([batch.prepared for batch in batches])
    schedules = [batch.prepared.schedule for batch in batches]
    spares = schedules[0].spares
    tokens = union(own.tokens_wanted(stage) for own in schedules for stage in range(len(own.bound.stages)))
    placed: list[TrainedRows] = []
    outputs: dict[tuple[int, str], Tensor] = {}
    for n, (batch, runs) in enumerate(zip(batches, runs_of, strict=True)):
        material = batch.prepared.material(runs, tensors)
        material = replace(material, source_order=batch.source_order, images_of=images_of[n])
        for run in runs:
            if run.edits:
                placed.append(TrainedRows.of(n, run, batch.examples, material, spares=spares))
            else:
                outputs[n, run.name] = batch.prepared.clean_outputs(run, batch.examples)

    def found(width: int) -> dict[TrainedRows, Tensor]:
        return outputs_of(vit, placed, width, spares=spares, tokens=tokens)

    with vit.lock:
        most = widest(vit, placed)
        for rows, output in (found(most) if torch.is_grad_enabled() else in_fewer_rows(found, most)).items():
            outputs[rows.batch, rows.run.name] = output
    return [torch.stack([outputs[n, run.name] for run in runs]) for n, runs in enumerate(runs_of)]


def _images_of(preparations: Sequence[Prepared]) -> list[ImagesOf]:
    """Numbers of images that tell the images of different preparations apart."""
    found: dict[int, ImagesOf] = {}
    highest = 0

    def above(own: ImagesOf, number: int) -> ImagesOf:
        return lambda origin: own(origin) + number

    for prepared in preparations:
        if id(prepared) not in found:
            sharing = prepared.schedule.sharing
            found[id(prepared)] = above(sharing.images_of, highest)
            highest += 1 + int(max(np.max(numbers) for numbers in sharing.images.values()))
    return [found[id(prepared)] for prepared in preparations]


def _most_source_tokens(vit: HookedViT, schedule: Schedule, run: BoundRun) -> int:
    every, n_tokens = range(schedule.n_examples), vit.layout.tokens.n_tokens
    counts = [
        int(edit.source.positions.counts(every, n_tokens).max()) if edit.site.has_tokens else 1
        for edit in run.edits
        if edit.source is not None
    ]
    return max(counts, default=0)
