"""One chunk of examples: its clean forwards, its waves stage by stage, and what the runs keep of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.engine.clean import CleanPass, clean_pass, means_of
from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.editing import Material
from vit_mechinterp.engine.pieces import by_owner
from vit_mechinterp.engine.positions import NONE, IntArray
from vit_mechinterp.engine.reads import clean_read
from vit_mechinterp.engine.schedule import Schedule
from vit_mechinterp.engine.values import Read, RunOrigin, Values
from vit_mechinterp.engine.wave import run_wave
from vit_mechinterp.model.head_weights import written_by_heads
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TensorRef

__all__ = ["Collected", "chunk_of"]

Tick = Callable[[int], None]
Earlier = Callable[[str, IntArray], Tensor]
Pieces = dict[tuple[str, Read], list[tuple[IntArray, Tensor]]]


@dataclass
class Collected:
    """What one chunk gave, on the CPU: outputs by run, and what shape one has; captures by run and name, with
    the number of tokens of each example where tokens are selected."""

    shape: tuple[int, ...]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    captures: dict[tuple[str, str], tuple[Tensor, list[int] | None]] = field(default_factory=dict)


def chunk_of(
    vit: HookedViT,
    data: Data,
    schedule: Schedule,
    chunk: range,
    tensors: Mapping[TensorRef, Tensor],
    means: Mapping[Read, Tensor],
    tick: Tick,
    passing: CleanPass = clean_pass,
    earlier: Earlier | None = None,
) -> Collected:
    """Compute everything that one chunk of examples gives.

    Args:
        passing: makes its clean values.
        earlier: outputs of a run for examples of earlier chunks, which rows of this one may be equal to.
    """
    bound = schedule.bound
    clean = passing(vit, data, schedule, chunk, tick=tick)
    if schedule.mean_reads and not means:
        means = means_of(schedule, clean)
        for read in means:
            if read not in schedule.last_stage and not schedule.is_kept(read):
                clean.values.pop(read, None)
    images_of, rows = schedule.sharing.images_of, schedule.rows.of(chunk)
    gifts, handed = rows.branches.gifts, rows.branches.handed
    write = partial(written_by_heads, vit.module, vit.layout)
    material = Material(
        bound, clean, tensors, means, images_of=images_of, gifts=gifts, handed=handed, write=write
    )
    outputs = _Outputs(chunk)
    wanted = {run.name for run in bound.with_output}
    captures: dict[tuple[str, str], Values] = {}
    captured: Pieces = defaultdict(list)
    for n, stage in enumerate(bound.stages):
        parts, copies = rows.parts[n], rows.copies[n]
        material.copies = by_owner(copies)
        tokens = schedule.tokens_wanted(stage)
        for segments in schedule.waves(parts):
            result = run_wave(vit, segments, material, spares=schedule.spares, tokens=tokens)
            if result.output is not None:
                sizes = [len(segment.examples) for segment in segments]
                for segment, output in zip(segments, torch.split(result.output.cpu(), sizes), strict=True):
                    outputs.put(segment.run.name, np.array(segment.examples), output)
            for key, pieces in result.captured.items():
                captured[key] += pieces
            tick(schedule.wave_blocks(segments))
        for same in (own for own in copies if own.run in wanted):
            inside = same.owners >= chunk.start
            if inside.any():
                outputs.put(same.run, same.examples[inside], outputs.get(same.owner, same.owners[inside]))
            if not inside.all():
                assert earlier is not None
                outputs.put(same.run, same.examples[~inside], earlier(same.owner, same.owners[~inside]))
        for run in stage:
            for read in bound.reads_of[run.name]:
                values = _joined(read, clean.values.get(clean_read(run, read)), captured, run.name, chunk)
                if isinstance(read.origin, RunOrigin):
                    material.run_values[read] = values
                else:
                    name = next(c.name for c in run.captures if c.read == read)
                    captures[run.name, name] = values
        # What no later stage reads, and no capture keeps, is dropped.
        done = {read for read, last in schedule.last_stage.items() if last == n}
        for read in done:
            material.run_values.pop(read, None)
            if not schedule.is_kept(read):
                clean.values.pop(read, None)
    part = Collected(vit.output_shape() if bound.readout is None else bound.readout.shape)
    for run in bound.runs:
        untouched = schedule.clean_rows(run.name, chunk) if run.has_output else NONE
        if len(untouched):
            outputs.put(run.name, untouched, clean.outputs[run.origin].whole(untouched).cpu())
        if run.has_output:
            part.outputs[run.name] = _kept(schedule, chunk, outputs.whole(run.name))
        for capture in run.captures:
            values = captures.get((run.name, capture.name)) or clean.values[capture.read]
            kept = values.whole(chunk) if values.starts is None else values.rows(chunk)
            counts = None if values.starts is None else capture.read.positions.counts(chunk, 0).tolist()
            part.captures[run.name, capture.name] = kept.cpu(), counts
    return part


class _Outputs:
    """Outputs of every run, in the order of the chunk's examples."""

    def __init__(self, chunk: range) -> None:
        self.chunk = chunk
        self._by_run: dict[str, Tensor] = {}

    def put(self, run: str, examples: IntArray, rows: Tensor) -> None:
        """Rows of some examples, which ascend."""
        if len(examples) == len(self.chunk):
            self._by_run[run] = rows
            return
        if run not in self._by_run:
            self._by_run[run] = rows.new_empty(len(self.chunk), *rows.shape[1:])
        self._by_run[run][torch.as_tensor(examples - self.chunk.start)] = rows

    def get(self, run: str, examples: IntArray) -> Tensor:
        """Rows of some examples, a copy."""
        return self._by_run[run][torch.as_tensor(examples - self.chunk.start)]

    def whole(self, run: str) -> Tensor:
        """Rows of all examples: a view, perhaps, of what a wave gave."""
        return self._by_run[run]


def _kept(
    schedule: Schedule, chunk: range, outputs: Float[Tensor, "example *output"]
) -> Float[Tensor, "example *kept"]:
    """What is kept of a run's outputs, read off a few rows at a time; the rest goes with the chunk."""
    readout = schedule.bound.readout
    if readout is None:
        return outputs
    examples = np.arange(chunk.start, chunk.stop)
    spans = (slice(i, i + schedule.width) for i in range(0, len(chunk), schedule.width))
    return torch.cat([readout(outputs[span], examples[span]) for span in spans])


def _joined(read: Read, clean: Values | None, captured: Pieces, run: str, chunk: range) -> Values:
    """Values of a run for a whole chunk: from its rows and, where no edit comes before, clean ones."""
    pieces = list(captured.pop((run, read), ()))
    examples = [own for own, _ in pieces]
    if not pieces:
        assert clean is not None
        return clean
    missing = np.setdiff1d(np.arange(chunk.start, chunk.stop), np.concatenate(examples))
    if len(missing):
        assert clean is not None
        whole = read.positions.is_all
        tokens = read.site.has_tokens
        piece = clean.whole(missing) if whole else clean.rows(missing, tokens=tokens)
        pieces.append((missing, piece))
        examples.append(missing)
    order = np.concatenate(examples)
    tensor = pieces[0][1] if len(pieces) == 1 else torch.cat([piece for _, piece in pieces])
    place = np.argsort(order, kind="stable")
    held = order[place]
    if read.positions.is_all:
        return Values(tensor, held, place)
    starts = np.concatenate([[0], np.cumsum(read.positions.counts(order, 0))])
    return Values(tensor, held, place, starts)
