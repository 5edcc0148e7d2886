"""The differentiable path: clean forwards once, then as many waves with gradients as a training takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.engine.ahead import requests_of
from vit_mechinterp.engine.bind import bind, expand_runs
from vit_mechinterp.engine.checks import check_images, refuse_dropout
from vit_mechinterp.engine.clean import CleanPass, clean_pass
from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.images import image_numbers
from vit_mechinterp.engine.prepared import Prepared
from vit_mechinterp.engine.schedule import Schedule
from vit_mechinterp.engine.sharing import Sharing
from vit_mechinterp.engine.store.clean import StoredClean
from vit_mechinterp.engine.tensors import check_tensors, resolve_refs
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.checkpointing import refuse_checkpointing
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.sparing import why_nothing_is_spared
from vit_mechinterp.spec import Experiment, Run, Sweep

if TYPE_CHECKING:
    from vit_mechinterp.engine.store import ActivationStore

__all__ = ["prepare"]


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
