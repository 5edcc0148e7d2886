"""How an experiment is cut: rows per forward by throughput, examples per chunk by the bytes they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.binding.checks import check_batch_size
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling.drafting import draft_of
from vit_mechinterp.engine.scheduling.footprint import Footprint, common_size, footprint
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.scheduling.sizes import in_words, parse_bytes
from vit_mechinterp.engine.scheduling.throughput import likely_width, measured_width, remembered_width
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.heap import uncollected
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TensorRef

__all__ = ["budget_of", "schedule_for"]

BUDGET = 2 * 1024**3
"""Bytes held beside the model on a CPU, unless something else is asked for."""
SHARE = 0.4
"""On a GPU, the share of the free memory."""
MULTIPLY_ADDS = {"cpu": 10**13}
MORE_MULTIPLY_ADDS = 10**15
"""Work per chunk, by device and elsewhere: a minute or so. A chunk is what is lost if an experiment is
killed, and what must be done again if memory runs out."""
TYPICAL = 256
"""Examples of a chunk for which it is reckoned what rows hand on to each other, before its size is known."""
MUCH = 10_000
"""(row, block) pairs for which a width would have been measured."""
LARGER = 10
"""So much larger a chunk may be where what chunks have in common is computed in each."""
WAVES = 4
"""Full forwards that a chunk should have at least."""
NARROWEST = {"cpu": 1}
ELSEWHERE = 32
"""Rows of the narrowest forwards that make room for what is shared, by device and elsewhere."""
FEWEST_ROWS, MOST_ROWS = 2048, 16384
"""Rows per chunk, whatever they cost. In a chunk of few examples runs share little of what edits take; and a
chunk's outputs are in memory."""


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
    held = footprint(vit, draft, together.states_handed_on)
    least = held.peak(1, 1)
    if memory is not None and least > budget:
        raise SpecError(f"memory={memory!r} is too little: one example and one row take {in_words(least)}.")
    if batch_size == "auto":
        # At least half of the budget is left for what a chunk of examples holds.
        widest = max(1, int(max(budget / 2, budget - 64 * held.example) // max(1, held.row)))
        width = _width(vit, draft, widest, imagined=data is None, measure=measure)
    elif memory is not None:
        width = min(int(batch_size), max(1, (budget - held.example) // max(1, held.row)))
    else:
        width = int(batch_size)
    return _cut(vit, replace(draft, width=width), held, max(budget, least), stored=stored)


def _width(vit: HookedViT, draft: Schedule, widest: int, *, imagined: bool, measure: bool) -> int:
    """Rows per forward: what was or is measured, if there is much work to do, or what is likely."""
    blocks = draft.sharing.n_edited_rows * draft.n_layers
    known = remembered_width(vit) if not imagined and blocks >= MUCH else None
    if known is None and measure:
        with vit.lock, torch.no_grad():
            known = measured_width(vit, widest, blocks // 2)
    return min(widest, known or likely_width(vit))


def _cut(vit: HookedViT, draft: Schedule, held: Footprint, budget: int, *, stored: bool) -> Schedule:
    """A schedule whose forwards are as wide as the draft's or, if only narrower ones leave room for all that
    chunks can share, as these."""
    first = schedule = _holding(vit, _in_chunks(vit, draft, held, budget), budget, stored=stored)
    narrowest = NARROWEST.get(vit.device.type, ELSEWHERE)
    while _wants_room(vit, schedule, stored=stored):
        width = schedule.width // 2
        if width < narrowest or not _may_fit(vit, first, held, budget, stored=stored):
            return first
        own = _in_chunks(vit, replace(draft, width=width), held, budget)
        schedule = _holding(vit, own, budget, stored=stored)
    return schedule


def _wants_room(vit: HookedViT, schedule: Schedule, *, stored: bool) -> bool:
    """Whether chunks would share more if there were more memory."""
    if len(schedule.chunks) == 1:
        return False
    if schedule.sharing.joins_examples and schedule.chunk < _most_examples(vit, schedule):
        return True
    return not (stored or schedule.holds) and bool(schedule.needs.common.needs)


def _may_fit(vit: HookedViT, schedule: Schedule, held: Footprint, budget: int, *, stored: bool) -> bool:
    """Whether the budget has room for what chunks have in common at any width."""
    return stored or common_size(vit, schedule) + held.example + held.row <= budget


def _in_chunks(vit: HookedViT, draft: Schedule, held: Footprint, budget: int) -> Schedule:
    """A schedule of as many examples per chunk as the budget holds, and its work allows."""
    left = budget - draft.width * held.row
    chunk = max(1, min(_most_examples(vit, draft), int(left // max(1, held.example))))
    schedule = replace(draft, chunk=chunk)
    # Which rows hand their values on depends on those that share a chunk.
    while chunk > 1 and (held := footprint(vit, schedule)).peak(chunk, schedule.width) > budget:
        chunk = max(1, min(chunk - 1, int(left // held.example)))
        schedule = replace(schedule, chunk=chunk)
    return schedule


def _most_examples(vit: HookedViT, schedule: Schedule) -> int:
    """Examples of a chunk, whatever they take."""
    rows = max(_rows_per_chunk(vit), WAVES * schedule.width)
    if schedule.sharing.joins_examples:
        rows *= LARGER
    return min(schedule.n_examples, _chunk_of(schedule, rows))


def _holding(vit: HookedViT, schedule: Schedule, budget: int, *, stored: bool) -> Schedule:
    """The same schedule, holding what several chunks need of clean forwards if the budget has room for it and
    no store does: in smaller chunks, if that makes room and their forwards are full."""
    if stored or len(schedule.chunks) == 1 or not schedule.needs.common.needs:
        return schedule
    chunks = [schedule.chunk]
    if not schedule.sharing.joins_examples:
        chunks.append(min(schedule.chunk, max(1, _chunk_of(schedule, WAVES * schedule.width))))
    for chunk in dict.fromkeys(chunks):
        whole = replace(schedule, chunk=chunk, holds=True)
        if footprint(vit, whole).peak(chunk, whole.width) <= budget:
            return whole
    return schedule


def _chunk_of(schedule: Schedule, rows: int) -> int:
    """Examples that have so many rows."""
    return int(rows / max(1.0, schedule.sharing.n_edited_rows / schedule.n_examples))


def _rows_per_chunk(vit: HookedViT) -> int:
    """Rows that a chunk should have, by what one costs in all blocks."""
    tokens, d_model = vit.layout.tokens.n_tokens, vit.layout.d_model
    # A token's weights, and its scores and sums over all others.
    row = vit.layout.n_layers * tokens * (12 * d_model * d_model + 2 * tokens * d_model)
    work = MULTIPLY_ADDS.get(vit.device.type, MORE_MULTIPLY_ADDS)
    return max(FEWEST_ROWS, min(MOST_ROWS, work // row))


def budget_of(vit: HookedViT) -> int:
    """Bytes held beside the model, unless something else is asked for."""
    if vit.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(vit.device)
        return int(SHARE * free)
    return BUDGET
