"""Finished chunks kept in a folder as they come, so that a killed experiment goes on where it was.

The folder of an experiment holds, while it runs, ``chunks/experiment.json`` (what is computed, and how it is
cut into chunks) and one tensor file per finished chunk; once it is done, the results. Several processes share
the chunks among themselves: each locks the chunk that it computes. Files take their names when they are
complete, and two processes that compute one chunk all the same write the same bits under the same name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.identity import differences
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.forwards.chunk import Collected
from vit_mechinterp.engine.results.claims import in_turn, waited_for
from vit_mechinterp.engine.results.joining import capture_names, join_chunks
from vit_mechinterp.engine.results.results import Results
from vit_mechinterp.engine.results.tensorfiles import (
    checksum,
    file_checksum,
    first_come,
    read_tensors,
    sweep,
    writing,
)
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.errors import ExecutionError, TensorFileError
from vit_mechinterp.spec.digest import digest

__all__ = ["FinishedChunks"]

_CUTTING = ("n_layers", "chunk", "width", "one_image", "spares", "holds")
"""Fields of a schedule that fix chunks and forwards."""

logger = logging.getLogger(__name__)


class FinishedChunks:
    """The chunks of one experiment in one folder.

    Args:
        folder: the folder of the experiment's results; made if need be.
        identity: what decides the results, as `identity_of` gives it.
        circumstances: what may change their last bits: device, threads, versions.
        schedule: how the work is cut, if this is the first start.

    Attributes:
        schedule: how the work is cut; fixed at the first start.

    Raises:
        ExecutionError: the folder holds another experiment, or nothing can be written there.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        circumstances: Mapping[str, Any],
        schedule: Schedule,
    ) -> None:
        self.results = Path(folder).expanduser()
        self.folder = self.results / "chunks"
        self.identity = dict(identity)
        self.digest = digest(self.identity)
        document = {
            "experiment": self.identity,
            "schedule": _cutting(schedule),
            "circumstances": dict(circumstances),
        }
        self._refuse_foreign_results()
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            sweep(self.results)
            stored = self._first(document)
        if found := differences(stored["experiment"], self.identity):
            raise ExecutionError(
                f"{self.results} holds another experiment: {'; '.join(found)}. Choose another folder, or "
                f"delete {self.folder} to begin anew; results that are in {self.results} are written over in "
                "the end."
            )
        if changed := differences(stored["circumstances"], document["circumstances"]):
            logger.warning(
                "%s was begun under other circumstances, so later chunks may differ in their last bits: %s.",
                self.results,
                "; ".join(changed),
            )
        own = _cutting(schedule)
        fixed = {name: value for name, value in stored["schedule"].items() if name in own}
        self.schedule = replace(schedule, **fixed)
        if fixed != own:
            logger.warning(
                "%s was begun with other chunks, which are kept so that the results are the same: %s.",
                self.results,
                ", ".join(_words(name, value) for name, value in fixed.items() if value != own[name]),
            )
        self._checked: dict[range, bool] = {}

    def _first(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """The document of whoever started first; ours, if it was us."""
        stored = self.decided("experiment", document)
        if not all(isinstance(stored.get(part), dict) for part in document):
            raise self._foreign("experiment")
        return stored

    def decided(self, name: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """What the first start decided under a name: ``document``, if this is it.

        Raises:
            ExecutionError: it cannot be written, or something else is there.
        """
        path = self._decision(name)
        with self._disk():
            if not path.exists():
                first_come(path, json.dumps(document, indent=2).encode())
            text = path.read_bytes()
        with suppress(ValueError):
            stored = json.loads(text)
            if isinstance(stored, dict):
                return stored
        raise self._foreign(name)

    def _refuse_foreign_results(self) -> None:
        """Raise ExecutionError rather than write over a document of somebody else's."""
        path = self.results / "results.json"
        if self.folder.exists() or not path.exists():
            return
        with suppress(ValueError, OSError):
            document = json.loads(path.read_text())
            if isinstance(document, dict) and "experiment" in document:
                return
        raise ExecutionError(
            f"{path} is no document of an experiment, and would be written over. Choose another folder."
        )

    def _decision(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _foreign(self, name: str) -> ExecutionError:
        return ExecutionError(
            f"{self._decision(name)} is not what an experiment leaves there. Choose another folder, or "
            f"delete {self.folder} to begin anew."
        )

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            gone = isinstance(error, FileNotFoundError) and self.results.is_dir()
            if gone or isinstance(error, TensorFileError):
                raise
            raise ExecutionError(
                f"Results cannot be written into {self.results}: {error.strerror or error}. Choose another "
                "folder, or make room; what is finished there stays, and the same call goes on from it."
            ) from error

    def path(self, chunk: range | None) -> Path:
        """The file of a chunk; None for the dataset means."""
        # Which means are read, and in which order, depends on what is left out: on the model's hooks.
        means = ["means", *map(repr, self.schedule.reads.means)]
        part = means if chunk is None else [chunk.start, chunk.stop]
        schedule = _cutting(self.schedule)
        name = digest({"experiment": self.digest, "schedule": schedule, "part": part})
        return self.folder / f"{name[:40]}.safetensors"

    def finished(self) -> Results | None:
        """The results, if the whole experiment is done and its file is sound."""
        try:
            document = json.loads((self.results / "results.json").read_text())
            if document["experiment"] != self.digest:
                return None
            if document["checksum"] == file_checksum(self.results / "results.safetensors"):
                return Results.load(self.results)
        except (OSError, ValueError, LookupError, TypeError):
            return None
        logger.warning("%s/results.safetensors is damaged; it is made anew.", self.results)
        (self.results / "results.json").unlink(missing_ok=True)
        return None

    def is_done(self) -> bool:
        """Whether the results are there, as far as their document says."""
        try:
            return bool(json.loads((self.results / "results.json").read_text())["experiment"] == self.digest)
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def next_of(self, waiting: list[range]) -> Generator[range, None, None]:
        """Chunks to compute, each locked for us until the next is asked for; those that are finished, here or
        by another process, leave ``waiting``.

        A chunk comes after the earlier ones whose outputs it reuses. Where all that are left are computed by
        others, wait for them; what a process leaves behind when it ends comes to us.
        """
        return in_turn(waiting, self.has, self._can_begin, self.is_done, self._lock)

    def _lock(self, chunk: range | None) -> Path:
        return self.path(chunk).with_suffix(".lock")

    def _can_begin(self, chunk: range) -> bool:
        chunks = self.schedule.chunks
        return all(self.has(chunks[number]) for number in self.schedule.rows.before(chunk))

    def outputs_of(self, run: str, examples: IntArray) -> Tensor:
        """Outputs of a run for some examples of finished chunks."""
        n, size = self._numbers[run], self.schedule.chunk
        rows = []
        for number in np.unique(examples // size).tolist():
            part = self._part(self.schedule.chunks[number])
            if part is None:
                raise FileNotFoundError(self.path(self.schedule.chunks[number]))
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
            self._checked[chunk] = self._read(self.path(chunk)) is not None
        return self._checked[chunk]

    def width(self) -> int:
        """Most rows in one forward: as at the first start, or less where memory has run out since."""
        widths = [int(part[1]["width"]) for chunk in self.schedule.chunks if (part := self._part(chunk))]
        return min([self.schedule.width, *widths])

    def _part(self, chunk: range) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        return self._read(self.path(chunk), check=False) if self.has(chunk) else None

    def _read(self, path: Path, *, check: bool = True) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        from safetensors import SafetensorError

        if not path.exists():
            return None
        try:
            tensors, metadata = read_tensors(path)
            sums = json.loads(metadata["checksums"])
            sound = not check or {name: checksum(x) for name, x in tensors.items()} == sums
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, LookupError):
            sound = False
        if sound:
            return tensors, metadata
        logger.warning("%s is damaged; it is dropped, and computed again.", path)
        path.unlink(missing_ok=True)
        return None

    def _write(self, path: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> None:
        layout = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
        sums = json.dumps({name: checksum(x) for name, x in tensors.items()})
        with self._disk():
            own = {key: str(value) for key, value in metadata.items()}
            with writing(path, layout, {"checksums": sums, **own}) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, tensor)

    def add(self, chunk: range, part: Collected, width: int, halvings: int) -> None:
        """Keep what a chunk gave."""
        runs, outputs = self.schedule.bound.runs, [part.outputs[name] for name in self._numbers]
        none = torch.empty(0, len(chunk), *part.shape)
        tensors = {"outputs": torch.stack(outputs) if outputs else none}
        for key, (n, name) in capture_names(self.schedule.bound).items():
            tensors[key], counts = part.captures[runs[n].name, name]
            if counts is not None:
                tensors[f"counts.{key}"] = torch.tensor(counts, dtype=torch.int64)
        self._write(self.path(chunk), tensors, width=width, halvings=halvings)
        self._checked[chunk] = True

    def means(self) -> dict[Read, Tensor] | None:
        """The dataset means, if they are finished."""
        found = self._read(self.path(None))
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
            self._write(self.path(None), tensors)

    def finish(self, labels: Mapping[str, Sequence[int]], provenance: Mapping[str, Any]) -> Results:
        """Join the chunks into the file of results, one at a time; the chunks' own files are removed."""
        paths = [self.path(chunk) for chunk in self.schedule.chunks]
        try:
            with self._disk():
                join_chunks(self.schedule, paths, self.results, labels, provenance, self.digest)
        except FileNotFoundError:
            # Another process has joined and removed them.
            if (results := self.finished()) is not None:
                return results
            raise
        for chunk in (*self.schedule.chunks, None):
            self.path(chunk).unlink(missing_ok=True)
            self._lock(chunk).unlink(missing_ok=True)
        return Results.load(self.results)


def _words(name: str, value: Any) -> str:
    """One of these values, in words."""
    of = {"chunk": "examples per chunk", "width": "rows per forward"}
    if name == "holds":
        return f"clean values that several chunks need {'held' if value else 'not held'}"
    return f"{value} {of[name]}" if name in of else f"{name} {value}"


def _cutting(schedule: Schedule) -> dict[str, Any]:
    """What fixes chunks and forwards, as plain values."""
    return {name: getattr(schedule, name) for name in _CUTTING}
