"""From what the chunks give to results: each tensor made once, and filled chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.binding.values import Read, by_token
from vit_mechinterp.engine.forwards.chunk import Collected
from vit_mechinterp.engine.results.results import Captures, Results

__all__ = ["Gathering", "in_native_order"]


class Gathering:
    """Outputs and captures of a whole experiment, in memory.

    Nothing is joined at the end: beside the results themselves, no more is held than one chunk gives.

    Args:
        bound: the bound runs.
        n_examples: examples of the dataset.
    """

    def __init__(self, bound: Bound, n_examples: int) -> None:
        self._runs = bound.runs
        self._n = n_examples
        self._numbers = {run.name: n for n, run in enumerate(bound.with_output)}
        self._outputs: Tensor | None = None
        self._captures = {
            (run.name, capture.name): _GatheredCapture(capture.read, n_examples)
            for run in bound.runs
            for capture in run.captures
        }

    def add(self, chunk: range, part: Collected) -> None:
        """Keep what a chunk gave."""
        if self._outputs is None:
            self._outputs = torch.empty(len(self._numbers), self._n, *part.shape)
        for run, rows in part.outputs.items():
            self._outputs[self._numbers[run], chunk.start : chunk.stop] = rows
        for key, (values, _) in part.captures.items():
            self._captures[key].put(chunk, values)

    def outputs_of(self, run: str, examples: IntArray) -> Tensor:
        """Outputs of a run for some examples of the chunks that are here."""
        assert self._outputs is not None, "no chunk is here yet"
        return self._outputs[self._numbers[run]][torch.as_tensor(examples)]

    def results(self, labels: Mapping[str, Sequence[int]], provenance: Mapping[str, Any]) -> Results:
        """The results, once all chunks are here."""
        assert self._outputs is not None, "no chunk is here yet"
        captures = {
            run.name: Captures(
                run.name, {c.name: self._captures.pop((run.name, c.name)).whole() for c in run.captures}
            )
            for run in self._runs
        }
        return Results(self._outputs, tuple(self._numbers), captures, labels, provenance)


class _GatheredCapture:
    """One capture of one run in memory, filled chunk by chunk."""

    def __init__(self, read: Read, n_examples: int) -> None:
        self._read = read
        self._counts: IntArray | None = None
        self._starts = np.arange(n_examples + 1)
        if not read.positions.is_all:
            self._counts = read.positions.counts(range(n_examples), 0)
            self._starts = np.concatenate([[0], np.cumsum(self._counts)])
        self._rows: Tensor | None = None

    def put(self, chunk: range, rows: Tensor) -> None:
        """Keep a chunk's rows: ``[example, ...]``, or one for each selected token."""
        if self._rows is None:
            self._rows = rows.new_empty(int(self._starts[-1]), *rows.shape[1:])
        self._rows[int(self._starts[chunk.start]) : int(self._starts[chunk.stop])] = rows

    def whole(self) -> Tensor | list[Tensor]:
        """All of it, in the site's own axis order."""
        assert self._rows is not None, "no chunk is here yet"
        counts = None if self._counts is None else self._counts.tolist()
        return in_native_order(self._read, self._rows, counts)


def in_native_order(
    read: Read, rows: Tensor, counts: Sequence[int] | None, *, equal: bool | None = None
) -> Tensor | list[Tensor]:
    """Captured rows in the site's own axis order; a list where examples differ in their number of tokens.

    Args:
        read: what was captured.
        rows: ``[example, token, *features]``, or with ``counts`` ``[m, *features]``.
        counts: tokens of every example.
        equal: whether all examples of the dataset have as many tokens; found in ``counts`` by default.
    """
    if counts is None:
        return by_token(read.site, rows).contiguous()
    if len(set(counts)) == 1 if equal is None else equal:
        return by_token(read.site, rows.reshape(-1, counts[0], *rows.shape[1:])).contiguous()
    return [
        part.transpose(0, 1).contiguous() if read.site.is_attention_matrix else part.contiguous()
        for part in torch.split(rows, list(counts))
    ]
