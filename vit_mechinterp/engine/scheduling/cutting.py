"""How an experiment is cut: rows per forward by throughput, examples per chunk by the bytes they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.binding.checks import check_batch_size
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling.budget import budget_of
from vit_mechinterp.engine.scheduling.drafting import draft_of
from vit_mechinterp.engine.scheduling.footprint import Footprint, footprint
from vit_mechinterp.engine.scheduling.pairs import pairs_of
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.scheduling.sizes import in_words, parse_bytes
from vit_mechinterp.engine.scheduling.throughput import likely_width, measured_width, remembered_width
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.heap import uncollected
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TensorRef

__all__ = ["schedule_for"]

CHUNK_WORK = {"cpu": 10**13, "cuda": 10**15}
"""Multiply-adds per chunk, by device: a minute or so. A chunk is what is lost if an experiment is killed, and
what must be done again if memory runs out."""
LAUNCH_WORK = {"cpu": 10**8, "cuda": 10**11}
"""Multiply-adds that take about as long as it takes to launch a block, by device: forwards get no narrower
than that to make room for what chunks share."""
FEWEST_ROWS, MOST_ROWS = 2048, 16384
"""Rows per chunk, whatever they cost. In a chunk of few examples runs share little of what edits take; and a
chunk's outputs are in memory."""
WAVES = 4
"""Full forwards that a chunk should have at least."""
LARGER = 10
"""So much larger a chunk may be where what chunks have in common is computed in each."""
TYPICAL = 256
"""Examples of a chunk for which it is reckoned what rows hand on to each other, before its size is known."""
MUCH = 10_000
"""(row, block) pairs for which a width would have been measured."""


@uncollected()
def schedule_for(
    vit: HookedViT,
    bound: Bound,
    data: Data | None,
    batch_size: int | Literal["auto"],
    *,
    memory: int | str | None = None,
    tensors: Mapping[TensorRef, Tensor] | None = None,
    measure: bool = False,
    progress: bool = False,
    stored: bool = False,
) -> Schedule:
    """Find what need not be computed and what is shared, and choose chunk and width.

    Args:
        vit: the model.
        bound: the bound runs.
        data: the examples; without them, one stands for all.
        batch_size: most rows in one forward, or ``"auto"``.
        memory: most bytes to hold beside the model; 2 GiB on a CPU, 40 % of what is free on a GPU by default.
        tensors: the given tensors, where they are known.
        measure: whether a forward may be timed, if there is much work to do.
        progress: show a bar while images are compared, if that takes longer than two seconds.
        stored: whether clean values may be read out of a store, in which what enters blocks is likelier to
            be found than what is inside them.

    Raises:
        SpecError: ``batch_size`` or ``memory`` is no such thing, or too little for one row.
    """
    check_batch_size(batch_size)
    budget = budget_of(vit) if memory is None else parse_bytes(memory)
    draft = draft_of(vit, bound, data, tensors, progress=progress, stored=stored)
    together = replace(draft, chunk=min(draft.n_examples, TYPICAL))
    held = footprint(vit, replace(draft, chunk=1), together.states_handed_on)
    _check_budget(memory, held, budget)
    if batch_size == "auto":
        # Rows get at least half of the budget, and more where 64 examples take less than the other half.
        widest = max(1, int(max(budget / 2, budget - 64 * held.example) // max(1, held.row)))
        width = _width(vit, draft, widest, imagined=data is None, measure=measure)
    elif memory is not None:
        width = min(int(batch_size), max(1, (budget - held.peak(1, 0)) // max(1, held.row)))
    else:
        width = int(batch_size)
    budget = max(budget, held.peak(1, 1))
    schedule = _cut(vit, replace(draft, width=width), budget, stored=stored)
    if schedule.chunk == 1:
        _check_budget(memory, footprint(vit, schedule), budget)
    return schedule


def _check_budget(memory: int | str | None, held: Footprint, budget: int) -> None:
    if memory is not None and (least := held.peak(1, 1)) > budget:
        enough = in_words(least, up=True)
        raise SpecError(f"memory={memory!r} is too little: one example and one row take {enough}.")


def _width(vit: HookedViT, draft: Schedule, widest: int, *, imagined: bool, measure: bool) -> int:
    """Rows per forward: what was or is measured, if there is much work to do, or what is likely."""
    blocks = draft.sharing.n_edited_rows * draft.n_layers
    known = remembered_width(vit, widest) if not imagined and blocks >= MUCH else None
    if known is None and measure:
        with vit.lock, torch.no_grad():
            known = measured_width(vit, widest, blocks // 2)
    return min(widest, known or likely_width(vit))


def _cut(vit: HookedViT, draft: Schedule, budget: int, *, stored: bool) -> Schedule:
    """A schedule that the budget holds, with forwards as wide as the draft's, or narrower ones if only these
    leave room for all that chunks can share; if nothing does, the one that computes least."""
    most = _most_examples(vit, draft)
    found: list[Schedule] = []
    for schedule in _candidates(vit, draft, most, budget, stored=stored):
        if _shares_all(schedule, most, stored=stored):
            return schedule
        found.append(schedule)
    return min(found, key=pairs_of) if draft.sharing.joins_examples else found[0]


def _candidates(
    vit: HookedViT, draft: Schedule, most: int, budget: int, *, stored: bool
) -> Iterator[Schedule]:
    """Schedules of at most so many examples per chunk, from wide forwards to narrow ones; of each width in
    chunks as large as the budget holds, and, without a store, holding what they have in common."""
    widths, may_hold = _widths(vit, draft.width), not stored
    for width in widths:
        apart = _in_chunks(vit, replace(draft, width=width), most, budget)
        yield apart
        whole = _holding(vit, apart, budget) if may_hold else None
        # Where few examples make up a forward, it is a narrower one, and wants less memory.
        if whole is not None and (width == widths[-1] or _chunk_of(whole, width) <= whole.chunk):
            yield whole
        if may_hold and width == widths[0]:
            last = _in_chunks(vit, replace(draft, width=widths[-1]), most, budget)
            may_hold = _may_hold(vit, last, budget)


def _widths(vit: HookedViT, widest: int) -> list[int]:
    """Rows per forward, half as many each time, down to those that a launch is worth."""
    narrowest = max(1, _for_device(vit, LAUNCH_WORK) // _block_work(vit))
    widths = [widest]
    while widths[-1] > narrowest:
        widths.append(max(narrowest, widths[-1] // 2))
    return widths


def _shares_all(schedule: Schedule, most: int, *, stored: bool) -> bool:
    """Whether more memory would not make chunks share more."""
    if len(schedule.chunks) == 1:
        return True
    if schedule.sharing.joins_examples and schedule.chunk < most:
        return False
    return stored or schedule.holds or not schedule.needs.common.needs


def _in_chunks(vit: HookedViT, draft: Schedule, most: int, budget: int) -> Schedule:
    """A schedule of as many examples per chunk as the budget holds, at most so many."""
    schedule = replace(draft, chunk=most)
    # Which rows hand their values on depends on those that share a chunk.
    while (held := footprint(vit, schedule)).peak(schedule.chunk, schedule.width) > budget:
        if schedule.chunk == 1:
            width = (budget - held.peak(1, 0)) // held.row
            return replace(schedule, width=max(1, min(schedule.width, width)))
        if schedule.reads.means and not schedule.needs.means_come_first:
            schedule = replace(schedule, chunk=schedule.chunk - 1)  # whose examples take less
        else:
            schedule = replace(schedule, chunk=_fewer(schedule, held, budget) or 1)
    return schedule


def _may_hold(vit: HookedViT, schedule: Schedule, budget: int) -> bool:
    """Whether the budget has room for what chunks have in common; with narrower chunks this is more."""
    return footprint(vit, replace(schedule, holds=True)).peak(1, schedule.width) <= budget


def _holding(vit: HookedViT, schedule: Schedule, budget: int) -> Schedule | None:
    """The same schedule, holding what several chunks need of clean forwards, in chunks that leave room for
    it; None if none do, or if they need nothing in common."""
    if not schedule.needs.common.needs:
        return None
    whole = replace(schedule, holds=True)
    while (held := footprint(vit, whole)).peak(whole.chunk, whole.width) > budget:
        chunk = _fewer(whole, held, budget)
        if chunk is None:
            return None
        whole = replace(whole, chunk=chunk)
    return whole


def _fewer(schedule: Schedule, held: Footprint, budget: int) -> int | None:
    """Fewer examples per chunk, of which each takes as much; None if there is room for none."""
    most = (budget - held.peak(0, schedule.width)) // max(1, held.example)
    chunk = min(schedule.chunk - 1, most)
    return chunk if chunk >= 1 else None


def _most_examples(vit: HookedViT, schedule: Schedule) -> int:
    """Examples of a chunk, whatever they hold: by the work that they are."""
    work = _for_device(vit, CHUNK_WORK) // (vit.layout.n_layers * _block_work(vit))
    rows = max(FEWEST_ROWS, min(MOST_ROWS, work), WAVES * schedule.width)
    if schedule.sharing.joins_examples:
        rows *= LARGER
    return max(1, min(schedule.n_examples, _chunk_of(schedule, rows)))


def _chunk_of(schedule: Schedule, rows: int) -> int:
    """Examples that have so many rows."""
    return int(rows / max(1.0, schedule.sharing.n_edited_rows / schedule.n_examples))


def _block_work(vit: HookedViT) -> int:
    """Multiply-adds of a row in one block: a token's weights, and its scores and sums over all others."""
    tokens, d_model = vit.layout.tokens.n_tokens, vit.layout.d_model
    return tokens * (12 * d_model * d_model + 2 * tokens * d_model)


def _for_device(vit: HookedViT, amounts: Mapping[str, int]) -> int:
    return amounts.get(vit.device.type, amounts["cuda"])
