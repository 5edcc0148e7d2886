"""The differentiable path: clean forwards once, then as many waves with gradients as a training takes."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

from torch import Tensor, nn
from tqdm.auto import tqdm

from vit_mechinterp.engine.binding.bind import bind, expand_runs
from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.binding.checks import (
    check_arguments,
    check_batch_size,
    check_images,
    check_progress,
    refuse_train_mode,
)
from vit_mechinterp.engine.binding.tensors import check_tensors, resolve_refs
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.forwards.clean import Clean, CleanPass, PlainClean, Tick, means_from
from vit_mechinterp.engine.forwards.exhaustion import in_fewer_rows
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.inputs.images import image_numbers
from vit_mechinterp.engine.rows.sharing import Sharing
from vit_mechinterp.engine.scheduling.budget import BUDGET, budget_of
from vit_mechinterp.engine.scheduling.footprint import footprint
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.scheduling.sizes import in_words, parse_bytes
from vit_mechinterp.engine.store.clean import StoredClean
from vit_mechinterp.engine.store.streamed import streamed
from vit_mechinterp.engine.training.prepared import Prepared
from vit_mechinterp.errors import SpecError, listed
from vit_mechinterp.model.checkpointing import refuse_checkpointing
from vit_mechinterp.model.heap import keeping, thrifty
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.output_tokens import output_tokens
from vit_mechinterp.model.sparing import why_nothing_is_spared
from vit_mechinterp.spec import Experiment, Run, Sweep

if TYPE_CHECKING:
    from vit_mechinterp.engine.store import ActivationStore

__all__ = ["prepare"]

P = ParamSpec("P")

CleanAndMeans = tuple[Clean, Mapping[Read, Tensor]]
"""Clean values, and dataset means."""

_WITH = "A preparation lasts as long as a block: write 'with prepare(...) as prepared:'"

logger = logging.getLogger(__name__)


class _Preparation(AbstractContextManager["Prepared"]):
    """What `prepare` gives, to be entered by ``with``."""

    def __init__(self, own: AbstractContextManager[Prepared]) -> None:
        self._own = own

    def __enter__(self) -> Prepared:
        return self._own.__enter__()

    def __exit__(self, *exception: Any) -> bool | None:
        return self._own.__exit__(*exception)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{_WITH}; prepared.{name} is there inside.")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise SpecError(f"{_WITH}, and call prepared(...) inside.")


def _in_with_alone(
    preparing: Callable[P, AbstractContextManager[Prepared]],
) -> Callable[P, AbstractContextManager[Prepared]]:
    @wraps(preparing)
    def prepare(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[Prepared]:
        return _Preparation(preparing(*args, **kwargs))

    return prepare


@_in_with_alone
@contextmanager
def prepare(
    vit: HookedViT,
    runs: Run | Sweep | Experiment | Iterable[Run | Sweep],
    data: Any,
    tensors: Mapping[str, Tensor],
    batch_size: int = 64,
    progress: bool = True,
    store: ActivationStore | None = None,
    memory: int | str | None = None,
) -> Iterator[Prepared]:
    """Do the clean forwards of an experiment once, and keep what its runs read, with the model frozen.

    Inside the ``with`` block the model stays as it is: its head, its parts and its weights. It is locked
    there, so only the thread that entered the block may call what it gives.

    Args:
        vit: the model; its parameters need no gradient inside the ``with`` block and are restored behind it.
        runs: runs, sweeps or an experiment; none may read another edited run, lack an output or have a
            capture. Outputs are whole, whatever the experiment's readout.
        data: a ``datasets.Dataset`` or a mapping of columns.
        tensors: initial values of the tensors that the specs name, for checking.
        batch_size: images per clean forward.
        progress: show a bar if it takes longer than two seconds.
        store: where clean values are read from if they are there, and kept if they are not.
        memory: most bytes to hold beside the model until the block is entered, and of clean values in it, or
            a text such as ``"4GiB"``; 2 GiB on a CPU, 40 % of what is free on a GPU by default. If clean
            values are more than is left beside a forward, they stay in the store, or without one in a
            temporary folder (``TMPDIR`` says where), and every batch reads its own. What batches take with
            their gradients comes on top: it is as large as they are.

    Where memory runs out, clean forwards are of half as many images, and a line says so. Runs that are equal
    or begin alike have rows of their own each, because the tensors that they name may come to differ.

    Yields:
        The prepared runs, to be called with examples and tensors as often as a training needs; they are
        closed at the end of the block.

    Raises:
        SpecError, DataError: before the first forward, if anything does not fit, ``memory`` one row among
            it.
        ExecutionError: the model would drop activations at random, has no weights, or has gradient
            checkpointing on.
    """
    check_arguments(vit, store)
    check_batch_size(batch_size, auto=False)
    check_progress(progress)
    flat = expand_runs(runs, vit.layout.n_layers)
    refuse_train_mode(vit)
    refuse_checkpointing(vit.module)
    columns = Data(data, vit, progress=progress)
    bound = bind(vit, flat, columns)
    _check_runs(bound)
    resolved = resolve_refs(bound, tensors, vit)
    check_tensors(bound, resolved, vit, columns.n)
    check_images(columns, bound)
    images = image_numbers(columns, sorted(bound.image_columns), progress=progress)
    sharing = Sharing(bound, images, rows=False)
    schedule, left = _within(vit, _schedule(vit, sharing, columns.n, batch_size), memory)
    streams = left < footprint(vit, schedule).peak(columns.n, 0)
    counter = _Counter(progress)
    with vit.lock, _frozen(vit.module), ExitStack() as stack:
        stack.enter_context(keeping() if memory is None else thrifty())
        if streams and store is None:
            store = stack.enter_context(_temporary(vit, left))

        def clean_values(rows: int) -> tuple[Schedule, CleanAndMeans]:
            own = replace(schedule, width=rows)
            return own, _clean(vit, columns, own, store, counter, streams=streams)

        with counter.bar:
            most = min(schedule.width, columns.n * len(images))
            schedule, (clean, means) = in_fewer_rows(clean_values, most)
        shapes = {ref: tuple(tensor.shape) for ref, tensor in resolved.items()}
        prepared = Prepared(vit, columns, schedule, clean, means, shapes, counter.total)
        stack.callback(prepared.close)
        yield prepared


def _check_runs(bound: Bound) -> None:
    """Raise SpecError for runs that cannot be prepared."""
    if len(bound.stages) > 1:
        raise SpecError(
            "A run that reads another edited run cannot be prepared for training; use execute for it."
        )
    if without := [run.name for run in bound.runs if not run.has_output]:
        raise SpecError(
            f"Runs without output (output=False) cannot be prepared, which is for their outputs: "
            f"{listed(without)}. Leave them, or output=False, out."
        )
    if capturing := [run.name for run in bound.runs if run.captures]:
        raise SpecError(
            f"Prepared runs give outputs and keep no captures, which are asked for of {listed(capturing)}. "
            "Leave capture out, or use execute for them."
        )


def _schedule(vit: HookedViT, sharing: Sharing, n_examples: int, batch_size: int) -> Schedule:
    """All examples in one chunk, whose rows come batch by batch."""
    return Schedule(
        sharing,
        n_layers=vit.layout.n_layers,
        chunk=n_examples,
        width=batch_size,
        one_image=vit.layout.family.one_image,
        spares=why_nothing_is_spared(vit.layout) is None,
        by_output=output_tokens(vit),
    )


def _within(vit: HookedViT, schedule: Schedule, memory: int | str | None) -> tuple[Schedule, int]:
    """The same schedule in clean forwards that take at most half of the budget, if one was given; and the
    bytes that are left for clean values.

    Raises:
        SpecError: the budget does not hold one row.
    """
    if memory is None:
        return schedule, budget_of(vit)
    budget, row = parse_bytes(memory), max(1, footprint(vit, schedule).row)
    if row > budget:
        raise SpecError(f"memory={memory!r} is too little: one row takes {in_words(row, up=True)}.")
    width = max(1, min(schedule.width, budget // 2 // row))
    return replace(schedule, width=width), budget - width * row


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient inside the ``with`` block."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class _Counter:
    """Counts (row, block) pairs of clean forwards, and shows them."""

    def __init__(self, progress: bool) -> None:
        self.total = 0
        self.bar = tqdm(desc="clean forwards", unit="block", unit_scale=True, delay=2.0, disable=not progress)

    def __call__(self, n: int) -> None:
        self.total += n
        self.bar.update(n)


def _clean(
    vit: HookedViT,
    data: Data,
    schedule: Schedule,
    store: ActivationStore | None,
    tick: Tick,
    *,
    streams: bool,
) -> CleanAndMeans:
    """Clean values and dataset means; the values are held, or read from the store when they are asked for."""
    if store is None:
        return _held(PlainClean(), vit, data, schedule, tick)
    stored = StoredClean(store.tiers, vit, data, schedule, schedule.width)
    found = (_streamed if streams else _held)(stored, vit, data, schedule, tick)
    store.flush()
    return found


def _held(passing: CleanPass, vit: HookedViT, data: Data, schedule: Schedule, tick: Tick) -> CleanAndMeans:
    """Clean values in memory, and the dataset means of them."""
    every = range(data.n)
    passing.expect(schedule, [every], means=False)
    with data.ahead(passing.requests(schedule, [every])):
        clean = passing(vit, data, schedule, every, tick=tick)
    return clean, means_from(schedule, clean)


def _streamed(
    stored: StoredClean, vit: HookedViT, data: Data, schedule: Schedule, tick: Tick
) -> CleanAndMeans:
    """Clean values that stay in a store, and dataset means of a few at a time."""
    with data.ahead(stored.requests(schedule, [range(data.n)])):
        clean = streamed(stored, schedule, tick)
    few = replace(schedule, chunk=min(schedule.width, data.n))
    return clean, stored.means(vit, data, few, tick)


@contextmanager
def _temporary(vit: HookedViT, budget: int) -> Iterator[ActivationStore]:
    """A store for as long as a preparation lasts, with a budget in memory, the rest on disk."""
    from vit_mechinterp.engine.store import ActivationStore

    on_gpu = vit.device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="vit-mechinterp-") as folder:
        disk = shutil.disk_usage(folder).free
        logger.info("Clean values exceed %s; they are kept in %s meanwhile.", in_words(budget), folder)
        host = min(budget, BUDGET)  # of a GPU's, the host may have less
        with ActivationStore(folder, gpu=budget if on_gpu else 0, host=host, disk=disk) as store:
            yield store
