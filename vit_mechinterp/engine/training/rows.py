"""Rows of several trainings in common growing batches, in the ambient grad mode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import BoundRun
from vit_mechinterp.engine.forwards.clean import Clean
from vit_mechinterp.engine.forwards.editing import Material
from vit_mechinterp.engine.forwards.wave import run_wave
from vit_mechinterp.engine.rows.order import Segment, filled, starts_late
from vit_mechinterp.engine.scheduling.reads import clean_sources
from vit_mechinterp.engine.scheduling.throughput import likely_width
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["TrainedRows", "outputs_of", "widest"]


@dataclass(frozen=True, eq=False)
class TrainedRows:
    """Rows of one run of a batch: the batch's number, the run, its examples, and what they read.

    ``place`` holds each example's place among ``examples``, where these are not in the batch's order: they
    ascend where rows of one image share a part of a block, and so stand together (see `filled`).
    """

    batch: int
    run: BoundRun
    examples: IntArray
    material: Material
    place: IntArray | None

    @classmethod
    def of(
        cls, batch: int, run: BoundRun, examples: Sequence[int], material: Material, *, spares: bool
    ) -> TrainedRows:
        """Rows of a run on some examples, in any order; ``spares`` as in `Schedule`."""
        own = np.asarray(examples, dtype=np.int64)
        if not (spares and starts_late(run)):
            return cls(batch, run, own, material, None)
        order = np.argsort(own, kind="stable")
        return cls(batch, run, own[order], material, np.argsort(order))

    def as_given(self, outputs: Tensor) -> Tensor:
        """Outputs of the examples in the order in which these were given."""
        if self.place is None:
            return outputs
        return outputs[torch.as_tensor(self.place, device=outputs.device)]

    def in_memory(self, examples: IntArray) -> Material:
        """What the rows of some examples read, out of any store."""
        values = self.material.clean.values
        reads = clean_sources(self.run)
        return replace(self.material, clean=Clean({own: values[own].in_memory(examples) for own in reads}))


def widest(vit: HookedViT, placed: Sequence[TrainedRows]) -> int:
    """Rows per growing batch: on a CPU what it is quickest with, elsewhere all of them."""
    rows = max(1, sum(len(own.examples) for own in placed))
    return min(rows, likely_width(vit)) if vit.device.type == "cpu" else rows


def outputs_of(
    vit: HookedViT, placed: Sequence[TrainedRows], width: int, *, spares: bool, tokens: tuple[int, ...] | None
) -> dict[TrainedRows, Tensor]:
    """The outputs ``[example, *output]`` of all rows, in the order in which their examples were given.

    Args:
        vit: the model; the caller holds its lock.
        placed: the rows.
        width: most of them in one growing batch.
        spares: whether parts of a joining block run once for rows that are still equal there.
        tokens: those that somebody reads behind the last attention call; None for all.
    """
    pieces: dict[TrainedRows, list[Tensor]] = defaultdict(list)
    for wave in filled(placed, width, spares=spares):
        segments = [Segment(rows.run, tuple(examples.tolist())) for rows, examples in wave]
        # Beforehand, because no forward can run inside another, whose hooks it would set off.
        materials = [rows.in_memory(examples) for rows, examples in wave]
        result = run_wave(vit, segments, materials, spares=spares, tokens=tokens)
        assert result.output is not None
        sizes = [len(examples) for _, examples in wave]
        for (rows, _), output in zip(wave, torch.split(result.output, sizes), strict=True):
            pieces[rows].append(output)
    return {rows: rows.as_given(torch.cat(own)) for rows, own in pieces.items()}
