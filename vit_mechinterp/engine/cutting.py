"""How an experiment is cut: rows per forward by throughput, examples per chunk by the bytes they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.bound import Bound
from vit_mechinterp.engine.checks import check_batch_size
from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.footprint import footprint
from vit_mechinterp.engine.images import image_numbers
from vit_mechinterp.engine.inside import starting_inside
from vit_mechinterp.engine.pruning import pruned
from vit_mechinterp.engine.reach import Reach
from vit_mechinterp.engine.schedule import Schedule
from vit_mechinterp.engine.sharing import Sharing
from vit_mechinterp.engine.sizes import in_words, parse_bytes
from vit_mechinterp.engine.throughput import likely_width, measured_width, remembered_width
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.read_tokens import follows_from, handed_on, read_tokens
from vit_mechinterp.model.sparing import why_nothing_is_spared
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
FEWEST_ROWS, MOST_ROWS = 2048, 16384
"""Rows per chunk, whatever they cost. In a chunk of few examples runs share little of what edits take; and a
chunk's outputs are in memory."""


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
    columns = sorted(bound.image_columns)
    if data is None:
        images = {column: np.array([n]) for n, column in enumerate(columns)}
    else:
        images = image_numbers(data, columns, progress=progress)
    n, read = len(next(iter(images.values()))), read_tokens(vit)
    follows = cache(partial(follows_from, vit))
    reach = Reach(vit.layout, read, n, tensors, follows, imagined=data is None)
    bound, spares = pruned(bound, reach), why_nothing_is_spared(vit.layout) is None
    if spares and not stored:
        bound = starting_inside(bound, vit.layout.n_layers)
    edited = {edit.site.name for run in bound.runs for edit in run.edits}
    same = handed_on(vit) if "resid_pre" in edited and edited & {"embed", "resid_post"} else frozenset()
    sharing = Sharing(bound, images, imagined=data is None, handed_on=same)
    one_image = vit.layout.family.one_image
    draft = Schedule(sharing, vit.layout.n_layers, n, 1, one_image, spares, read)
    states = replace(draft, chunk=min(n, TYPICAL)).states_handed_on
    held = footprint(vit, draft, states)
    least = held.peak(1, 1 if batch_size == "auto" else int(batch_size))
    if memory is not None and least > budget:
        raise SpecError(
            f"memory={memory!r} is too little: one example and "
            f"{'one row' if batch_size == 'auto' else f'{batch_size} rows'} take {in_words(least)}."
        )
    # At least half of the budget is left for what a chunk of examples holds.
    widest = max(1, int(max(budget / 2, budget - 64 * held.example) // max(1, held.row)))
    rows = sum(len(part.examples) for parts in sharing.parts.values() for part in parts)
    if batch_size == "auto":
        known = remembered_width(vit) if data is not None and _is_large(draft, rows) else None
        if known is None and measure:
            with vit.lock, torch.no_grad():
                known = measured_width(vit, widest, rows * vit.layout.n_layers // 2)
        width = min(widest, known or likely_width(vit))
    else:
        width = int(batch_size)
    left = budget - width * held.row
    per_example = max(1.0, rows / n)
    at_once = max(_rows_per_chunk(vit), 4 * width) / per_example
    chunk = max(1, min(n, int(left // max(1, held.example)), int(at_once)))
    schedule = replace(draft, chunk=chunk, width=width)
    # Which rows hand their values on depends on those that share a chunk.
    while chunk > 1 and (held := footprint(vit, schedule)).peak(chunk, width) > max(budget, least):
        chunk = max(1, min(chunk - 1, int(left // held.example)))
        schedule = replace(schedule, chunk=chunk)
    return schedule


def _rows_per_chunk(vit: HookedViT) -> int:
    """Rows that a chunk should have, by what one costs in all blocks."""
    tokens, d_model = vit.layout.tokens.n_tokens, vit.layout.d_model
    # A token's weights, and its scores and sums over all others.
    row = vit.layout.n_layers * tokens * (12 * d_model * d_model + 2 * tokens * d_model)
    work = MULTIPLY_ADDS.get(vit.device.type, MORE_MULTIPLY_ADDS)
    return max(FEWEST_ROWS, min(MOST_ROWS, work // row))


def _is_large(schedule: Schedule, rows: int) -> bool:
    """Whether the work is of a size for which a width would have been measured."""
    return rows * schedule.n_layers >= 10_000


def budget_of(vit: HookedViT) -> int:
    """Bytes held beside the model, unless something else is asked for."""
    if vit.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(vit.device)
        return int(SHARE * free)
    return BUDGET
