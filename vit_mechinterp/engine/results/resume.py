"""Finished chunks kept in a folder as they come, so that a killed experiment goes on where it was.

While an experiment runs, its folder holds one tensor file per finished chunk, beside what was decided at its
first start; once it is done, the results. Several processes share the chunks among themselves: each locks
the chunk that it computes. Files take their names when they are complete, and two processes that compute one
chunk all the same write the same bits under the same name.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.files.sealed import read_sealed, write_sealed
from vit_mechinterp.engine.forwards.chunk import Collected
from vit_mechinterp.engine.results.begun import Begun, cutting_of
from vit_mechinterp.engine.results.claims import in_turn, waited_for
from vit_mechinterp.engine.results.joining import capture_names, join_chunks
from vit_mechinterp.engine.results.results import Results
from vit_mechinterp.spec.digest import digest

__all__ = ["FinishedChunks"]


class FinishedChunks:
    """The chunks of one experiment that was begun in a folder.

    Args:
        begun: the experiment, and where it is kept.
    """

    def __init__(self, begun: Begun) -> None:
        self.begun = begun
        self.schedule = begun.schedule
        self._checked: dict[range, bool] = {}

    def path(self, chunk: range | None) -> Path:
        """The file of a chunk; None for the dataset means."""
        # Which means are read, and in which order, depends on what is left out: on the model's hooks.
        means = ["means", *map(repr, self.schedule.reads.means)]
        part = means if chunk is None else [chunk.start, chunk.stop]
        schedule = cutting_of(self.schedule)
        name = digest({"experiment": self.begun.digest, "schedule": schedule, "part": part})
        return self.begun.chunks / f"{name[:40]}.safetensors"

    def next_of(self, waiting: list[range]) -> Generator[range, None, None]:
        """Chunks to compute, each locked for us until the next is asked for; those that are finished, here or
        by another process, leave ``waiting``.

        A chunk comes after the earlier ones whose outputs it reuses. Where all that are left are computed by
        others, wait for them; what a process leaves behind when it ends comes to us.
        """
        return in_turn(waiting, self.has, self._can_begin, self.begun.is_done, self._lock)

    def _name(self, chunk: range | None) -> str:
        """What the file of a chunk, or of the dataset means, is of."""
        return f"{self.begun.digest}, {'means' if chunk is None else f'{chunk.start} to {chunk.stop - 1}'}"

    def _lock(self, chunk: range | None) -> Path:
        return self.path(chunk).with_suffix(".lock")

    def _can_begin(self, chunk: range) -> bool:
        chunks = self.schedule.chunks
        return all(self.has(chunks[number]) for number in self.schedule.rows.before(chunk))

    def outputs_of(self, run: str, examples: IntArray) -> Tensor:
        """Outputs of a run for some examples of finished chunks.

        Raises:
            ExecutionError: a chunk's file is gone.
        """
        n, size = self._numbers[run], self.schedule.chunk
        rows = []
        for number in np.unique(examples // size).tolist():
            part = self._part(self.schedule.chunks[number])
            if part is None:
                raise self.begun.gone(self.path(self.schedule.chunks[number]))
            rows.append((number, part[0]["outputs"][n]))
        found = dict(rows)
        return torch.stack([found[i // size][i % size] for i in examples.tolist()])

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The numbers of runs among the outputs."""
        return {run.name: n for n, run in enumerate(self.schedule.bound.with_output)}

    def has(self, chunk: range) -> bool:
        """Whether a chunk is finished, looked at once; a damaged file is dropped with a warning."""
        if not self._checked.get(chunk, False):
            self._checked[chunk] = self._read(chunk) is not None
        return self._checked[chunk]

    def width(self) -> int:
        """Most rows in one forward: as at the first start, or less where memory has run out since."""
        widths = [int(part[1]["width"]) for chunk in self.schedule.chunks if (part := self._part(chunk))]
        return min([self.schedule.width, *widths])

    def _part(self, chunk: range) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        return self._read(chunk, check=False) if self.has(chunk) else None

    def _read(
        self, chunk: range | None, *, check: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        with self.begun.disk(reading=True):
            return read_sealed(self.path(chunk), self._name(chunk), check=check)

    def add(self, chunk: range, part: Collected, width: int, halvings: int) -> None:
        """Keep what a chunk gave."""
        runs, outputs = self.schedule.bound.runs, [part.outputs[name] for name in self._numbers]
        none = torch.empty(0, len(chunk), *part.shape)
        tensors = {"outputs": torch.stack(outputs) if outputs else none}
        for key, (n, name) in capture_names(self.schedule.bound).items():
            tensors[key], counts = part.captures[runs[n].name, name]
            if counts is not None:
                tensors[f"counts.{key}"] = torch.tensor(counts, dtype=torch.int64)
        with self.begun.disk():
            write_sealed(self.path(chunk), tensors, self._name(chunk), width=width, halvings=halvings)
        self._checked[chunk] = True

    def means(self) -> dict[Read, Tensor] | None:
        """The dataset means, if they are finished."""
        found = self._read(None)
        if found is None:
            return None
        return {read: found[0][f"mean.{n}"].clone() for n, read in enumerate(self.schedule.reads.means)}

    def computing_means(self) -> AbstractContextManager[dict[Read, Tensor] | None]:
        """The dataset means as soon as another process that computes them has, or None if they are ours to
        compute inside the ``with`` block."""
        return waited_for(self._lock(None), self.means)

    def add_means(self, means: Mapping[Read, Tensor]) -> None:
        """Keep the dataset means, which every chunk reads."""
        tensors = {f"mean.{n}": means[read].cpu() for n, read in enumerate(self.schedule.reads.means)}
        if tensors:
            with self.begun.disk():
                write_sealed(self.path(None), tensors, self._name(None))

    def finish(self, labels: Mapping[str, Sequence[int]], provenance: Mapping[str, Any]) -> Results:
        """Join the chunks into the file of results, one at a time; the chunks' own files are removed.

        Raises:
            ExecutionError: it cannot be written, or a chunk's file is gone.
        """
        paths, begun = [self.path(chunk) for chunk in self.schedule.chunks], self.begun
        with begun.disk():
            try:
                join_chunks(self.schedule, paths, begun.results, labels, provenance, begun.digest)
            except FileNotFoundError:
                # Another process has joined and removed them.
                if (results := begun.finished()) is not None:
                    return results
                for path in paths:
                    if not path.exists() and begun.results.is_dir():
                        raise begun.gone(path) from None
                raise
        for chunk in (*self.schedule.chunks, None):
            self.path(chunk).unlink(missing_ok=True)
            self._lock(chunk).unlink(missing_ok=True)
        return Results.load(begun.results)
