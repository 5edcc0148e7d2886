"""From the files of finished chunks to the file of results: one chunk in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.files.tensorfiles import read_tensors, writing
from vit_mechinterp.engine.results.collect import in_native_order
from vit_mechinterp.engine.results.results import capture_keys, save_document
from vit_mechinterp.engine.scheduling.schedule import Schedule

__all__ = ["capture_names", "join_chunks"]

Spec = tuple[torch.dtype, tuple[int, ...]]


def capture_names(bound: Bound) -> dict[str, tuple[int, str]]:
    """Run number and name of every capture, by the name of its tensor in a chunk's file."""
    return {
        f"capture.{n}.{k}": (n, capture.name)
        for n, run in enumerate(bound.runs)
        for k, capture in enumerate(run.captures)
    }


class _CaptureInFiles:
    """One capture of one run: which tensor it is in a chunk's file, and which in the file of results."""

    def __init__(self, key: str, run: int, name: str, read: Read) -> None:
        self.key, self.run, self.name, self.read = key, run, name, read
        self.counts: list[int] | None = None
        """Tokens of every example, where tokens are selected."""

    @cached_property
    def ragged(self) -> bool:
        """Whether examples differ in their number of tokens; to be asked once all counts are known."""
        return self.counts is not None and len(set(self.counts)) > 1

    def keys(self, n: int) -> list[str]:
        """Names of its tensors in the file of results."""
        return capture_keys(self.run, self.name, n if self.ragged else None)

    def shown(self, rows: Tensor, examples: range) -> Tensor | list[Tensor]:
        """Rows of some examples in the site's own axis order."""
        own = None if self.counts is None else self.counts[examples.start : examples.stop]
        return in_native_order(self.read, rows, own, equal=not self.ragged)

    def layout(self, rows: Tensor, n: int) -> dict[str, Spec]:
        """dtype and shape of its tensors, from the rows of the first chunk."""
        few = rows[: 1 if self.counts is None else self.counts[0]]
        first = self.shown(few, range(1))[0]
        shape, axis = tuple(first.shape), int(self.read.site.is_attention_matrix)
        if not self.ragged or self.counts is None:
            return {self.keys(n)[0]: (rows.dtype, (n, *shape))}
        shapes = [(*shape[:axis], count, *shape[axis + 1 :]) for count in self.counts]
        return {key: (rows.dtype, own) for key, own in zip(self.keys(n), shapes, strict=True)}


def join_chunks(
    schedule: Schedule,
    paths: Sequence[Path],
    folder: Path,
    labels: Mapping[str, Sequence[int]],
    provenance: Mapping[str, Any],
    experiment: str,
) -> None:
    """Write ``results.safetensors`` and ``results.json`` into a folder.

    Raises:
        FileNotFoundError: a chunk's file is gone.
    """
    runs = schedule.bound.runs
    captures = [
        _CaptureInFiles(key, run, name, next(c.read for c in runs[run].captures if c.name == name))
        for key, (run, name) in capture_names(schedule.bound).items()
    ]
    halvings = max(int(provenance["halvings"]), _count_tokens(paths, captures))
    _copy(schedule, paths, captures, folder / "results.safetensors")
    index = [
        {
            "run": runs[capture.run].name,
            "site": capture.name,
            "keys": capture.keys(schedule.n_examples),
            "ragged": capture.ragged,
        }
        for capture in captures
    ]
    names, every = ([run.name for run in own] for own in (schedule.bound.with_output, runs))
    complete = {**provenance, "halvings": halvings}
    save_document(folder, names, every, index, labels, complete, experiment=experiment)


def _count_tokens(paths: Sequence[Path], captures: Sequence[_CaptureInFiles]) -> int:
    """Tell captures how many tokens every example has; the most halvings at which any chunk was computed."""
    halvings = 0
    for path in paths:
        tensors, metadata = read_tensors(path)
        halvings = max(halvings, int(metadata["halvings"]))
        for capture in captures:
            if f"counts.{capture.key}" in tensors:
                capture.counts = [] if capture.counts is None else capture.counts
                capture.counts.extend(tensors[f"counts.{capture.key}"].tolist())
    return halvings


def _copy(schedule: Schedule, paths: Sequence[Path], captures: Sequence[_CaptureInFiles], into: Path) -> None:
    """Write outputs and captures of all chunks into one file."""
    n = schedule.n_examples
    first, _ = read_tensors(paths[0])
    outputs = first["outputs"]
    layout: dict[str, Spec] = {"logits": (outputs.dtype, (len(outputs), n, *outputs.shape[2:]))}
    for capture in captures:
        layout |= capture.layout(first[capture.key], n)
    keys = {capture.key: capture.keys(n) for capture in captures}
    with writing(into, layout) as writer:
        for chunk, path in zip(schedule.chunks, paths, strict=True):
            tensors, _ = read_tensors(path)
            for run, rows in enumerate(tensors["outputs"]):
                writer.write("logits", rows, (run * n + chunk.start) * rows[0].numel())
            for capture in captures:
                value = capture.shown(tensors[capture.key], chunk)
                if isinstance(value, Tensor):
                    writer.write(keys[capture.key][0], value, chunk.start * value[0].numel())
                    continue
                for key, part in zip(keys[capture.key][chunk.start : chunk.stop], value, strict=True):
                    writer.write(key, part)
