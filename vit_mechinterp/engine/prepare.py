"""The differentiable path: clean forwards once, then as many waves with gradients as a training takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.engine.bind import bind, expand_runs
from vit_mechinterp.engine.clean import Clean, clean_pass, means_of
from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.execute import check_images, refuse_dropout
from vit_mechinterp.engine.schedule import Schedule, Segment
from vit_mechinterp.engine.tensors import check_tensors, resolve_refs
from vit_mechinterp.engine.wave import Material, run_wave
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Experiment, Run, Sweep

__all__ = ["Prepared", "prepare"]


class Prepared:
    """Runs whose clean forwards are done; made by `prepare`.

    Attributes:
        n_examples: number of examples held.
        clean_evaluations: (row, block) pairs that the clean forwards took.
        nbytes: bytes of clean values held.
    """

    def __init__(self, vit: HookedViT, schedule: Schedule, clean: Clean, clean_evaluations: int) -> None:
        self.vit = vit
        self._schedule = schedule
        self._clean = clean
        self._means = means_of(schedule, clean)
        self.n_examples = schedule.n_examples
        self.clean_evaluations = clean_evaluations
        self.nbytes = sum(values.nbytes for values in clean.values.values())

    @property
    def run_names(self) -> tuple[str, ...]:
        """Names of the runs, in the order of the outputs."""
        return tuple(run.name for run in self._schedule.bound.runs)

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
            source_order: a permutation of each source selection's tokens (training DAS, Lepori et al., A.6).
        """
        bound = self._schedule.bound
        refs = resolve_refs(bound, tensors, self.vit)
        material = Material(
            bound, range(self.n_examples), self._clean, refs, means=self._means, source_order=source_order
        )
        outputs: dict[str, Tensor] = {}
        index = torch.as_tensor(list(examples), device=self.vit.device)
        for stage in bound.stages:
            ordered = sorted(stage, key=lambda run: run.join(self._schedule.n_layers))
            with self.vit.lock:
                result = run_wave(self.vit, [Segment(run, tuple(examples)) for run in ordered], material)
            outputs |= result.outputs
        for run in bound.runs:
            if not run.edits:
                outputs[run.name] = self._clean.outputs[run.run.base][index]
        return torch.stack([outputs[run.name] for run in bound.runs])


@contextmanager
def prepare(
    vit: HookedViT,
    runs: Run | Sweep | Experiment | Iterable[Run | Sweep],
    data: Any,
    tensors: Mapping[str, Tensor],
    batch_size: int = 64,
    progress: bool = True,
) -> Iterator[Prepared]:
    """Do the clean forwards of an experiment once, and hold what its runs read; the model is frozen
    meanwhile.

    Args:
        vit: the model; its parameters need no gradient inside the ``with`` block and are restored behind it.
        runs: runs, sweeps or an experiment; none may read another edited run.
        data: a ``datasets.Dataset`` or a mapping of columns.
        tensors: initial values of the tensors that the specs name, for checking.
        batch_size: images per clean forward.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        SpecError, DataError: before the first forward, if anything does not fit.
    """
    flat = expand_runs(runs, vit.layout.n_layers)
    refuse_dropout(vit)
    columns = Data(data, vit)
    bound = bind(vit, flat, columns)
    if len(bound.stages) > 1:
        raise SpecError(
            "A run that reads another edited run cannot be prepared for training; use execute for it."
        )
    check_tensors(bound, resolve_refs(bound, tensors, vit), vit, columns.n)
    check_images(columns, bound)
    schedule = Schedule(bound, vit.layout.n_layers, columns.n, columns.n, batch_size)
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
            with bar:
                clean = clean_pass(vit, columns, schedule, range(columns.n), tick=tick)
            yield Prepared(vit, schedule, clean, evaluations)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
