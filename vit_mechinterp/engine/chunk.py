"""One chunk of examples: its clean forwards, its waves stage by stage, and what the runs keep of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.bound import Bound
from vit_mechinterp.engine.clean import clean_pass, means_of
from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.schedule import Schedule
from vit_mechinterp.engine.values import Read, RunOrigin, Values
from vit_mechinterp.engine.wave import Material, run_wave
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TensorRef

__all__ = ["Collected", "chunk_of"]

Tick = Callable[[int], None]


class Collected:
    """Outputs and captures on the CPU, written chunk by chunk."""

    def __init__(self, bound: Bound) -> None:
        self.outputs: dict[str, list[Tensor]] = {run.name: [] for run in bound.runs}
        self.captures: dict[tuple[str, str], list[tuple[Tensor, list[int] | None]]] = {}


def chunk_of(
    vit: HookedViT,
    data: Data,
    schedule: Schedule,
    chunk: range,
    tensors: Mapping[TensorRef, Tensor],
    means: Mapping[Read, Tensor],
    tick: Tick,
) -> Collected:
    """Compute everything that one chunk of examples gives."""
    bound = schedule.bound
    clean = clean_pass(vit, data, schedule, chunk, tick=tick)
    if schedule.mean_reads and not means:
        means = means_of(schedule, clean)
    material = Material(bound, chunk, clean, tensors, means)
    part = Collected(bound)
    captured: dict[tuple[str, Read], list[Tensor]] = {}
    for stage in bound.stages:
        for segments in schedule.waves(stage, chunk):
            result = run_wave(vit, segments, material)
            for name, output in result.outputs.items():
                part.outputs[name].append(output.cpu())
            for key, value in result.captured.items():
                captured.setdefault(key, []).append(value)
            tick(schedule.wave_blocks(segments))
        in_stage = {run.name for run in stage}
        for read in bound.run_reads:
            if isinstance(read.origin, RunOrigin) and read.origin.run in in_stage:
                material.run_values[read] = _values(read, captured[read.origin.run, read], chunk)
    for run in bound.runs:
        if not run.edits:
            part.outputs[run.name].append(clean.outputs[run.run.base].cpu())
        for capture in run.captures:
            read = capture.read
            if run.is_clean_at(read.site):
                values = clean.values[read]
            else:
                values = _values(read, captured[run.name, read], chunk)
            counts = None if values.starts is None else np.diff(values.starts).tolist()
            part.captures[run.name, capture.name] = [(values.tensor.cpu(), counts)]
    return part


def _values(read: Read, pieces: list[Tensor], chunk: range) -> Values:
    tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if read.positions.is_all:
        return Values(tensor)
    counts = [len(read.positions.of(i) or ()) for i in chunk]
    return Values(tensor, np.concatenate([[0], np.cumsum(counts)]))
