"""How many bytes the engine holds beside the model, reckoned from shapes before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.binding.values import Read, origin_of
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site

__all__ = ["SUMMED", "Footprint", "common_size", "footprint", "forward_size", "read_size"]


SUMMED = 2**16
"""Bytes of values that are added up at once, unless one takes more."""
_IMAGES = 4
"""Images for each row of a clean forward: on its own and in the batch, for this batch and for the next one,
which is made meanwhile."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that an experiment's computation takes at most.

    Args:
        example: bytes held for every example of a chunk: clean values, values of runs, and captures until
            they are handed on.
        row: bytes of one row while its forward runs.
        result: bytes of captures, and of what is kept of the outputs, of one example, which are the caller's.
        common: bytes of what is held for all chunks: clean values that several need, and dataset means.
    """

    example: int
    row: int
    result: int
    common: int = 0

    def peak(self, chunk: int, rows: int) -> int:
        """Bytes for a chunk of examples and forwards of at most so many rows."""
        return self.common + chunk * self.example + rows * self.row


def footprint(vit: HookedViT, schedule: Schedule, states: int | None = None) -> Footprint:
    """Reckon what one example and one row of a schedule take.

    ``states`` is how many values of the residual stream are handed on for every example; by default those of
    the schedule's own chunks.
    """
    bound = schedule.bound
    element = torch.finfo(vit.dtype).bits // 8
    held = schedule.sharing.once(
        ("held", schedule.chunk, schedule.holds),
        lambda: sum(read_size(vit, read) for read in _of_its_own(schedule)),
    )
    held += (schedule.states_handed_on if states is None else states) * math.prod(vit.sites()["embed"].shape)
    kept = sum(read_size(vit, read) for own in bound.reads_of.values() for read in own)
    captures = sum(read_size(vit, c.read) for run in bound.runs for c in run.captures)
    outputs = 4 * len(bound.with_output) * math.prod(vit.output_shape())
    handed_over = outputs if bound.readout is None else 4 * len(bound.with_output) * bound.readout.size
    # A run's values come in pieces that are then joined, so for a moment both are there.
    example = element * (held + 2 * kept) + 2 * outputs
    if schedule.needs.means_come_first and not schedule.holds:  # their pass goes by the same chunks
        example = max(example, element * sum(read_size(vit, read) for read in schedule.reads.means))
    common = _means_size(vit, schedule) + (common_size(vit, schedule) if schedule.holds else 0)
    return Footprint(
        example=_in_use(example),
        row=_in_use(element * forward_size(vit, _visited(bound))),
        result=element * captures + handed_over,
        common=_in_use(common),
    )


def _in_use(nbytes: int) -> int:
    """Bytes that a process comes to hold for tensors of so many: memory lies free between them, and what
    plans and counts is not free of charge either."""
    return nbytes + nbytes // 8


def _of_its_own(schedule: Schedule) -> set[Read]:
    """Clean values that a chunk may have beside those that are held for several."""
    means = () if schedule.needs.means_come_first else schedule.reads.means
    reads = schedule.reads.by_chunks.union(means)
    return {read for read in reads if not (schedule.holds and read in schedule.needs.common.entirely)}


def common_size(vit: HookedViT, schedule: Schedule) -> int:
    """Bytes of what several chunks need of clean forwards, and of what dataset means are made of."""
    element, images_of = torch.finfo(vit.dtype).bits // 8, schedule.sharing.images_of
    total = 0
    for need, examples in schedule.needs.common.needs.items():
        images = len(np.unique(images_of(origin_of(need))[examples]))
        if not isinstance(need, Read):
            total += images * 4 * math.prod(vit.output_shape())
        else:
            total += (images if need.positions.is_all else len(examples)) * element * read_size(vit, need)
    return total


def _means_size(vit: HookedViT, schedule: Schedule) -> int:
    """Bytes of dataset means in float64, of their sums, and of what is summed at once."""
    sizes = [math.prod(vit.sites()[str(read.site)].shape) for read in schedule.reads.means]
    tokens = vit.layout.tokens.n_tokens
    of_tokens = [not read.positions.is_all for read in schedule.reads.means]
    items = [size // tokens if pooled else size for size, pooled in zip(sizes, of_tokens, strict=True)]
    return 8 * (2 * sum(items) + 2 * max(items, default=0)) + (SUMMED if items else 0)


def read_size(vit: HookedViT, read: Read) -> int:
    """Numbers of one read, for the example that selects the most tokens."""
    size = math.prod(vit.sites()[str(read.site)].shape)
    return size if read.positions.is_all else size * read.positions.most // vit.layout.tokens.n_tokens


def forward_size(vit: HookedViT, visited: Iterable[Site]) -> int:
    """Numbers that one row takes at most while its forward runs: its image and those made ahead, what a block
    makes of it, and copies that joining, reading and editing make.

    Args:
        vit: the model.
        visited: sites that are read or edited; attention matrices and results of single heads are there only
            where somebody visits one.
    """
    tokens, d_model, heads = vit.layout.tokens.n_tokens, vit.layout.d_model, vit.layout.n_heads
    visited = tuple(visited)
    hidden = [i.shape[-1] for name, i in vit.sites().items() if name.endswith(("mlp.pre", "mlp.pre_linear"))]
    size = _IMAGES * math.prod(vit.layout.tokens.input_shape)
    size += tokens * (14 * d_model + 3 * max(hidden, default=4 * d_model))
    if any(site.is_attention_matrix for site in visited):
        size += 5 * heads * tokens * tokens
    if any(site.name == "attn.result" for site in visited):
        size += 4 * tokens * heads * d_model
    return size


def _visited(bound: Bound) -> Iterator[Site]:
    """Every site that is read or edited."""
    yield from (edit.site for run in bound.runs for edit in run.edits)
    yield from (read.site for own in bound.reads_of.values() for read in own)
    yield from (read.site for run in bound.runs for edit in run.edits for read in edit.reads)
