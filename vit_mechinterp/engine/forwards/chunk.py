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

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import Bound, BoundRun
from vit_mechinterp.engine.binding.values import Read, RunOrigin, Values
from vit_mechinterp.engine.forwards.clean import Clean, CleanPass, Tick, means_from
from vit_mechinterp.engine.forwards.editing import Material
from vit_mechinterp.engine.forwards.handover import Handover
from vit_mechinterp.engine.forwards.wave import run_wave
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.rows.copies import by_owner
from vit_mechinterp.engine.scheduling.reads import clean_read
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.model.head_weights import written_by_heads
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TensorRef

__all__ = ["Collected", "Setting", "chunk_of"]

Earlier = Callable[[str, IntArray], Tensor]
Pieces = dict[tuple[str, Read], list[tuple[IntArray, Tensor]]]


@dataclass
class Collected:
    """What one chunk gave, on the CPU: outputs by run, and what shape one has; captures by run and name, with
    the number of tokens of each example where tokens are selected."""

    shape: tuple[int, ...]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    captures: dict[tuple[str, str], tuple[Tensor, list[int] | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What all chunks of an experiment have in common.

    Args:
        vit: the model.
        data: the examples.
        tensors: the given tensors.
        clean: makes clean values.
        tick: called with the number of (row, block) pairs of every forward.
    """

    vit: HookedViT
    data: Data
    tensors: Mapping[TensorRef, Tensor]
    clean: CleanPass
    tick: Tick


def chunk_of(
    setting: Setting,
    schedule: Schedule,
    chunk: range,
    means: Mapping[Read, Tensor],
    earlier: Earlier,
) -> Collected:
    """Compute everything that one chunk of examples gives.

    Args:
        setting: the model, the data, and what else all chunks have.
        schedule: what is to be computed.
        chunk: the examples.
        means: dataset means; empty where the chunk's own clean values give them.
        earlier: gives outputs of a run for examples of earlier chunks, which rows of this one may be equal
            to.

    Returns:
        Outputs and captures of these examples, on the CPU.
    """
    clean = setting.clean(setting.vit, setting.data, schedule, chunk, tick=setting.tick)
    if schedule.reads.means and not means:
        means = means_from(schedule, clean)
    work = _Chunk(setting, schedule, chunk, clean, means)
    for stage in range(len(schedule.bound.stages)):
        work.compute(stage)
        work.copy(stage, earlier)
        work.keep(stage)
        work.drop(stage)
    return work.collected()


class _Chunk:
    """A chunk whose clean forwards are made, stage by stage."""

    def __init__(
        self,
        setting: Setting,
        schedule: Schedule,
        chunk: range,
        clean: Clean,
        means: Mapping[Read, Tensor],
    ) -> None:
        self.vit, self.tick = setting.vit, setting.tick
        self.schedule, self.chunk, self.clean = schedule, chunk, clean
        self.rows = schedule.rows.of(chunk)
        self.material = Material(
            schedule.bound,
            clean,
            setting.tensors,
            means,
            images_of=schedule.sharing.images_of,
            handover=Handover(self.rows.branches.gifts, self.rows.branches.handed),
            write=partial(written_by_heads, self.vit.module, self.vit.layout),
        )
        self._with_output = {run.name for run in schedule.bound.with_output}
        self._outputs = _Outputs(chunk)
        self._pieces: Pieces = defaultdict(list)
        self._captures: dict[tuple[str, Read], Values] = {}

    def compute(self, stage: int) -> None:
        """Pass the rows of a stage through the model, in waves."""
        self.material.handover.copies = by_owner(self.rows.copies[stage])
        tokens = self.schedule.tokens_wanted(stage)
        for segments in self.schedule.waves(self.rows.parts[stage]):
            result = run_wave(self.vit, segments, self.material, spares=self.schedule.spares, tokens=tokens)
            if result.output is not None:
                sizes = [len(segment.examples) for segment in segments]
                outputs = torch.split(result.output.float().cpu(), sizes)
                for segment, output in zip(segments, outputs, strict=True):
                    self._outputs.put(segment.run.name, np.array(segment.examples), output)
            for key, pieces in result.captured.items():
                self._pieces[key] += pieces
            self.tick(self.schedule.wave_blocks(segments))

    def copy(self, stage: int, earlier: Earlier) -> None:
        """Give rows of a stage that are equal to others the outputs of these."""
        for same in self.rows.copies[stage]:
            if same.run not in self._with_output:
                continue
            inside = same.owners >= self.chunk.start
            if inside.any():
                own = self._outputs.get(same.owner, same.owners[inside])
                self._outputs.put(same.run, same.examples[inside], own)
            if not inside.all():
                before = earlier(same.owner, same.owners[~inside])
                self._outputs.put(same.run, same.examples[~inside], before)

    def keep(self, stage: int) -> None:
        """Put together what is captured and read of the runs of a stage."""
        for run in self._bound.stages[stage]:
            for read in self._bound.reads_of[run.name]:
                values = self._joined(run, read)
                if isinstance(read.origin, RunOrigin):
                    self.material.run_values[read] = values
                else:
                    self._captures[run.name, read] = values

    def drop(self, stage: int) -> None:
        """Let go of what no later stage reads, and no capture keeps."""
        for read, last in self.schedule.reads.last_stage.items():
            if last == stage:
                self.material.run_values.pop(read, None)
                if read not in self.schedule.reads.kept:
                    self.clean.values.pop(read, None)

    def collected(self) -> Collected:
        """What the runs keep; clean forwards answer the rows that no edit changes."""
        readout = self._bound.readout
        part = Collected(self.vit.output_shape() if readout is None else readout.shape)
        for run in self._bound.with_output:
            untouched = self.schedule.needs.clean_rows(run.name, self.chunk)
            if len(untouched):
                own = self.clean.values[run.origin].whole(untouched)
                self._outputs.put(run.name, untouched, own.cpu())
            part.outputs[run.name] = self._read_out(self._outputs.whole(run.name))
        for run in self._bound.runs:
            for capture in run.captures:
                key = run.name, capture.read
                values = self._captures[key] if key in self._captures else self.clean.values[capture.read]
                is_whole = values.starts is None
                kept = values.whole(self.chunk) if is_whole else values.rows(self.chunk)
                counts = None if is_whole else capture.read.positions.counts(self.chunk, 0).tolist()
                part.captures[run.name, capture.name] = kept.cpu(), counts
        return part

    @property
    def _bound(self) -> Bound:
        return self.schedule.bound

    def _read_out(self, outputs: Float[Tensor, "example *output"]) -> Float[Tensor, "example *kept"]:
        """What is kept of a run's outputs, read off a few rows at a time; the rest goes with the chunk."""
        readout, width = self._bound.readout, self.schedule.width
        if readout is None:
            return outputs
        examples = np.arange(self.chunk.start, self.chunk.stop)
        spans = (slice(i, i + width) for i in range(0, len(examples), width))
        return torch.cat([readout(outputs[span], examples[span]) for span in spans])

    def _joined(self, run: BoundRun, read: Read) -> Values:
        """Values of a run for all examples: from its rows and, where no edit comes before, clean ones."""
        as_clean = clean_read(run, read)
        pieces = self._pieces.pop((run.name, read), [])
        if not pieces:
            return self.clean.values[as_clean]
        covered = np.concatenate([examples for examples, _ in pieces])
        missing = np.setdiff1d(np.arange(self.chunk.start, self.chunk.stop), covered)
        if len(missing):
            pieces.append((missing, self.clean.values[as_clean].selected(read, missing)))
        return Values.joined(read, pieces)


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
