"""The differentiable path: clean forwards once, then as many waves with gradients as a training takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.engine.ahead import requests_of
from vit_mechinterp.engine.bind import bind, expand_runs
from vit_mechinterp.engine.checks import check_images, refuse_dropout
from vit_mechinterp.engine.clean import Clean, CleanPass, clean_pass, means_of
from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.editing import Material
from vit_mechinterp.engine.images import image_numbers
from vit_mechinterp.engine.provenance import provenance_of
from vit_mechinterp.engine.schedule import Schedule, Segment
from vit_mechinterp.engine.sharing import Sharing
from vit_mechinterp.engine.store_clean import StoredClean
from vit_mechinterp.engine.tensors import check_tensors, resolve_refs
from vit_mechinterp.engine.wave import run_wave
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.checkpointing import refuse_checkpointing
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.sparing import why_nothing_is_spared
from vit_mechinterp.spec import Experiment, Run, Sweep

if TYPE_CHECKING:
    from vit_mechinterp.engine.store import ActivationStore

__all__ = ["Prepared", "prepare"]


class Prepared:
    """Runs whose clean forwards are done; made by `prepare`.

    Attributes:
        n_examples: number of examples held.
        most_source_tokens: tokens in the largest source selection of any run and example; 0 without sources.
        clean_evaluations: (row, block) pairs that the clean forwards took.
        nbytes: bytes of clean values held.
    """

    def __init__(
        self, vit: HookedViT, data: Data, schedule: Schedule, clean: Clean, clean_evaluations: int
    ) -> None:
        self.vit = vit
        self._data = data
        self._schedule = schedule
        self._clean = clean
        self._means = means_of(schedule, clean)
        self.n_examples = schedule.n_examples
        self.most_source_tokens = _most_source_tokens(vit, schedule)
        self.clean_evaluations = clean_evaluations
        self.nbytes = sum(values.nbytes for values in clean.values.values())

    @property
    def run_names(self) -> tuple[str, ...]:
        """Names of the runs, in the order of the outputs."""
        return tuple(run.name for run in self._schedule.bound.runs)

    def provenance(self) -> dict[str, Any]:
        """Digests of spec, model and data, device and versions, as `execute` gives them."""
        return provenance_of(self.vit, self._data, self._schedule, {}, halvings=0)

    def __call__(
        self,
        examples: Sequence[int],
        tensors: Mapping[str, Tensor],
        source_order: Sequence[int] | None = None,
    ) -> Float[Tensor, "run example *output"]:
        """Outputs of every run on some examples, in the ambient grad mode.

        Gradients flow to ``tensors`` and stop at the interventions: the clean part is constant.

        Args:
            examples: which examples, in any order.
            tensors: tensors that the specs refer to by name; they may change from call to call.
            source_order: the order in which every source selection's tokens are paired with the base's, a
                permutation of ``range(most_source_tokens)`` (for training DAS, Lepori et al. 2024); an
                example of fewer tokens leaves out those it lacks.

        Raises:
            SpecError: ``source_order`` is no such permutation, or ``examples`` names none or too high ones.
        """
        if len(examples) == 0 or min(examples) < 0 or max(examples) >= self.n_examples:
            raise SpecError(
                f"examples={list(examples)} must name at least one of the {self.n_examples} examples, 0 to "
                f"{self.n_examples - 1}."
            )
        if source_order is not None and sorted(source_order) != list(range(self.most_source_tokens)):
            raise SpecError(
                f"source_order={list(source_order)} is no order of the sources' tokens: give each of "
                f"0 to {self.most_source_tokens - 1} once."
            )
        bound = self._schedule.bound
        refs = resolve_refs(bound, tensors, self.vit)
        images = self._schedule.sharing.images
        material = Material(
            bound, self._clean, refs, means=self._means, source_order=source_order, images=images
        )
        outputs: dict[str, Tensor] = {}
        for stage in bound.stages:
            ordered = sorted(stage, key=lambda run: run.join(self._schedule.n_layers))
            with self.vit.lock:
                segments = [Segment(run, tuple(examples)) for run in ordered]
                result = run_wave(self.vit, segments, material, spares=self._schedule.spares)
            outputs |= {run.name: output for run, output in zip(ordered, result.outputs, strict=True)}
        for run in bound.runs:
            if not run.edits:
                outputs[run.name] = self._clean.outputs[run.run.base].whole(examples)
        return torch.stack([outputs[run.name] for run in bound.runs])


def _most_source_tokens(vit: HookedViT, schedule: Schedule) -> int:
    every, n_tokens = range(schedule.n_examples), vit.layout.tokens.n_tokens
    counts = [
        int(edit.source.positions.counts(every, n_tokens).max()) if edit.site.has_tokens else 1
        for run in schedule.bound.runs
        for edit in run.edits
        if edit.source is not None
    ]
    return max(counts, default=0)


@contextmanager
def prepare(
    vit: HookedViT,
    runs: Run | Sweep | Experiment | Iterable[Run | Sweep],
    data: Any,
    tensors: Mapping[str, Tensor],
    batch_size: int = 64,
    progress: bool = True,
    store: ActivationStore | None = None,
) -> Iterator[Prepared]:
    """Do the clean forwards of an experiment once, and hold what its runs read, with the model frozen.

    Args:
        vit: the model; its parameters need no gradient inside the ``with`` block and are restored behind it.
        runs: runs, sweeps or an experiment; none may read another edited run.
        data: a ``datasets.Dataset`` or a mapping of columns.
        tensors: initial values of the tensors that the specs name, for checking.
        batch_size: images per clean forward.
        progress: show a bar if it takes longer than two seconds.
        store: where clean values are read from if they are there, and kept if they are not.

    Raises:
        SpecError, DataError: before the first forward, if anything does not fit.
        ExecutionError: the model would drop activations at random, or has gradient checkpointing on.
    """
    flat = expand_runs(runs, vit.layout.n_layers)
    refuse_dropout(vit)
    refuse_checkpointing(vit.module)
    columns = Data(data, vit, progress=progress)
    bound = bind(vit, flat, columns)
    if len(bound.stages) > 1:
        raise SpecError(
            "A run that reads another edited run cannot be prepared for training; use execute for it."
        )
    check_tensors(bound, resolve_refs(bound, tensors, vit), vit, columns.n)
    check_images(columns, bound)
    images = image_numbers(columns, sorted(bound.image_columns), progress=progress)
    one_image, spares = vit.layout.family.one_image, why_nothing_is_spared(vit.layout) is None
    sharing = Sharing(bound, images, rows=False)
    schedule = Schedule(sharing, vit.layout.n_layers, columns.n, batch_size, one_image, spares)
    passing: CleanPass = clean_pass
    if store is not None:
        passing = StoredClean(store.tiers, vit, columns, schedule, batch_size)
    ahead = passing.requests if isinstance(passing, StoredClean) else requests_of
    every = range(columns.n)
    parameters = [p for p in vit.module.parameters() if p.requires_grad]
    evaluations = 0
    bar = tqdm(desc="clean forwards", unit="block", unit_scale=True, delay=2.0, disable=not progress)

    def tick(n: int) -> None:
        nonlocal evaluations
        evaluations += n
        bar.update(n)

    with vit.lock:
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            with bar, columns.ahead(ahead(schedule, [every])):
                clean = passing(vit, columns, schedule, every, tick=tick)
            if store is not None:
                store.tiers.flush()
            yield Prepared(vit, columns, schedule, clean, evaluations)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
