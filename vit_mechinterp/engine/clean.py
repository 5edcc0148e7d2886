"""Clean forwards: each image once, no further than anybody reads, keeping only what somebody reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.schedule import Schedule, seed_of
from vit_mechinterp.engine.values import Read, Values, gather
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Instrument, StopForward

__all__ = ["Clean", "clean_pass", "dataset_means", "means_of"]


@dataclass
class Clean:
    """What the clean forwards of one chunk gave: values by read, outputs by image column."""

    values: dict[Read, Values] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def clean_pass(
    vit: HookedViT,
    data: Data,
    schedule: Schedule,
    chunk: range,
    reads: Sequence[Read] | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> Clean:
    """Run the clean forwards of one chunk under ``no_grad``, not inference mode: trainings read the values.

    Args:
        reads: only these reads (and no outputs); all of the schedule's by default.
        tick: called with the number of (row, block) pairs of every forward.
    """
    clean = Clean()
    columns = schedule.columns if reads is None else schedule.columns_of(reads)
    for column in columns:
        images = schedule.images(column, chunk, reads)
        wanted = schedule.reads_of(column, reads)
        pieces: dict[Read, list[tuple[list[int], Tensor]]] = {read: [] for read in wanted}
        outputs: list[Tensor] = []
        blocks = schedule.stop(column, reads).blocks(schedule.n_layers)
        for start in range(0, len(images), schedule.clean_width):
            batch = images[start : start + schedule.clean_width]
            output = _forward(vit, data, schedule, column, chunk, batch, pieces, reads)
            if reads is None and column in schedule.outputs and output is not None:
                kept = [row for row, image in enumerate(batch) if image in chunk]
                outputs.append(output[kept].float())
            tick(len(batch) * blocks)
        clean.values.update({read: _assemble(read, pieces[read], chunk) for read in wanted})
        if outputs:
            clean.outputs[column] = torch.cat(outputs)
    return clean


def _forward(
    vit: HookedViT,
    data: Data,
    schedule: Schedule,
    column: str,
    chunk: range,
    batch: list[int],
    pieces: dict[Read, list[tuple[list[int], Tensor]]],
    reads: Sequence[Read] | None,
) -> Tensor | None:
    row_of = {image: row for row, image in enumerate(batch)}
    instrument = Instrument(vit.module, vit.layout)

    def keep(read: Read, examples: list[int], rows: list[int]) -> Callable[[Tensor], None]:
        span = slice(0, len(batch)) if rows == list(range(len(batch))) else rows

        def visitor(value: Tensor) -> None:
            pieces[read].append((examples, gather(read.site, value, span, read, examples)))

        return visitor

    held: dict[int | None, tuple[list[int], list[int]]] = {}
    for read in pieces:
        seed = seed_of(read)
        if seed not in held:
            images = zip(chunk, schedule.images_of(seed, chunk), strict=True)
            here = [(i, row_of[image]) for i, image in images if image in row_of]
            held[seed] = [i for i, _ in here], [row for _, row in here]
        if held[seed][0]:
            instrument.visit(read.site, keep(read, *held[seed]))
    stop = schedule.stop(column, reads)
    if stop.layer is not None:
        instrument.stop(stop.layer, before=stop.before)
    output: Tensor | None = None
    with torch.no_grad(), instrument.installed():
        with suppress(StopForward):
            output = vit(data.images(column, batch))
        instrument.verify()
    return output


def _assemble(read: Read, pieces: list[tuple[list[int], Tensor]], chunk: range) -> Values:
    """Join what several forwards gave, in the order of the chunk's examples."""
    order = [i for examples, _ in pieces for i in examples]
    tensor = pieces[0][1] if len(pieces) == 1 else torch.cat([piece for _, piece in pieces])
    in_order = order == list(chunk)
    if read.positions.is_all:
        if not in_order:
            tensor = tensor[torch.as_tensor(np.argsort(order, kind="stable"), device=tensor.device)]
        return Values(tensor)
    counts = [len(read.positions.of(i) or ()) for i in order]
    values = Values(tensor, np.concatenate([[0], np.cumsum(counts)]))
    if in_order:
        return values
    places = [int(p) for p in np.argsort(order, kind="stable")]
    starts = np.concatenate([[0], np.cumsum([counts[p] for p in places])])
    return Values(values.rows(places), starts)


def means_of(schedule: Schedule, clean: Clean) -> dict[Read, Tensor]:
    """Dataset means from a clean pass over the whole dataset."""
    return {
        read: _sum(read, clean.values[read])[0] / _sum(read, clean.values[read])[1]
        for read in schedule.mean_reads
    }


def dataset_means(
    vit: HookedViT, data: Data, schedule: Schedule, tick: Callable[[int], None] = lambda n: None
) -> dict[Read, Tensor]:
    """Dataset means by a pass of their own over every chunk; sums are kept in float64."""
    sums: dict[Read, Tensor] = {}
    counts: dict[Read, int] = dict.fromkeys(schedule.mean_reads, 0)
    for chunk in schedule.chunks:
        clean = clean_pass(vit, data, schedule, chunk, schedule.mean_reads, tick)
        for read in schedule.mean_reads:
            total, count = _sum(read, clean.values[read])
            sums[read] = total if read not in sums else sums[read] + total
            counts[read] += count
    return {read: sums[read] / counts[read] for read in schedule.mean_reads}


def _sum(read: Read, values: Values) -> tuple[Tensor, int]:
    tensor = values.tensor.double()
    return tensor.sum(dim=0), tensor.shape[0]
