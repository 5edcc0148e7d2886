"""An experiment that was begun in a folder: what was decided at its first start holds at every later one.

``chunks/experiment.json`` says what is computed, how it is cut into chunks, and under which circumstances it
was begun. Several processes may start at once: whoever comes first decides.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vit_mechinterp.engine.binding.identity import differences
from vit_mechinterp.engine.files.sealed import open_document, seal_document
from vit_mechinterp.engine.files.tensorfiles import file_checksum, first_come, sweep
from vit_mechinterp.engine.results.results import Results
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.errors import ExecutionError, TensorFileError
from vit_mechinterp.spec.digest import digest

__all__ = ["Begun", "cutting_of"]

_CUTTING = ("n_layers", "chunk", "width", "one_image", "spares", "holds")
"""Fields of a schedule that fix chunks and forwards."""

logger = logging.getLogger(__name__)


def cutting_of(schedule: Schedule) -> dict[str, Any]:
    """What fixes chunks and forwards, as plain values."""
    return {name: getattr(schedule, name) for name in _CUTTING}


class Begun:
    """One experiment in one folder.

    Args:
        folder: the folder of the experiment's results; made if need be.
        identity: what decides the results, as `identity_of` gives it.
        circumstances: what may change their last bits: device, threads, versions.
        schedule: how the work is cut, if this is the first start.

    Attributes:
        results: the folder of the results.
        chunks: the folder of what is finished of them.
        digest: of the identity.
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
        self.chunks = self.results / "chunks"
        self.digest = digest(dict(identity))
        own = {"experiment": dict(identity), "schedule": cutting_of(schedule)}
        document = {**own, "circumstances": dict(circumstances)}
        self._refuse_foreign_results()
        with self.disk():
            self.chunks.mkdir(parents=True, exist_ok=True)
            sweep(self.chunks)
            sweep(self.results)
            first = self.decided("experiment", document)
        if not all(isinstance(first.get(part), dict) for part in document):
            raise self._foreign("experiment")
        if found := differences(first["experiment"], document["experiment"]):
            raise ExecutionError(
                f"{self.results} holds another experiment: {'; '.join(found)}. Choose another folder, or "
                f"delete {self.chunks} to begin anew; results that are in {self.results} are written over in "
                "the end."
            )
        if changed := differences(first["circumstances"], document["circumstances"]):
            logger.warning(
                "%s was begun under other circumstances, so later chunks may differ in their last bits: %s.",
                self.results,
                "; ".join(changed),
            )
        self.schedule = self._as_begun(schedule, first["schedule"])

    def _as_begun(self, schedule: Schedule, first: Mapping[str, Any]) -> Schedule:
        """A schedule that is cut as the first one was."""
        own = cutting_of(schedule)
        fixed = {name: value for name, value in first.items() if name in own}
        if others := [_words(name, value) for name, value in fixed.items() if value != own[name]]:
            logger.warning(
                "%s was begun with other chunks, which are kept so that the results are the same: %s.",
                self.results,
                ", ".join(others),
            )
        return replace(schedule, **fixed)

    def decided(self, name: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """What the first start decided under a name: ``document``, if this is it.

        Raises:
            ExecutionError: it cannot be written, or something else is there.
        """
        path = self._decision(name)
        with self.disk():
            if not path.exists():
                first_come(path, seal_document(document))
            stored = open_document(path.read_bytes())
        if stored is None or stored.keys() != document.keys():
            raise self._foreign(name)
        return stored

    def _decision(self, name: str) -> Path:
        return self.chunks / f"{name}.json"

    def _foreign(self, name: str) -> ExecutionError:
        return ExecutionError(
            f"{self._decision(name)} is damaged, or not what an experiment leaves there. Choose another "
            "folder, or delete it: what the same call has finished beside it is kept."
        )

    def _refuse_foreign_results(self) -> None:
        """Raise ExecutionError rather than write over a document of somebody else's."""
        path = self.results / "results.json"
        if self.chunks.exists() or not path.exists():
            return
        with suppress(ValueError, OSError):
            document = json.loads(path.read_text())
            if isinstance(document, dict) and "experiment" in document:
                return
        raise ExecutionError(
            f"{path} is no document of an experiment, and would be written over. Choose another folder."
        )

    @contextmanager
    def disk(self, *, reading: bool = False) -> Iterator[None]:
        """Inside the ``with`` block: an ExecutionError that says where, if the disk cannot be written on, or
        read from, or the folder is gone."""
        try:
            yield
        except OSError as error:
            if isinstance(error, TensorFileError):
                raise
            inside = isinstance(error, FileNotFoundError) and Path(error.filename or "").parent == self.chunks
            if inside and not self.chunks.is_dir() and self.results.is_dir():
                raise self.gone(self.chunks) from error
            what = "read from" if reading else "written into"
            remedy = "Mend that" if reading else "Choose another folder, or make room"
            if self.results.is_file():
                raise ExecutionError(
                    f"Results cannot be {what} {self.results}: it is a file. Choose another folder."
                ) from error
            raise ExecutionError(
                f"Results cannot be {what} {self.results}: {error.strerror or error}. {remedy}; what is "
                "finished there stays, and the same call goes on from it."
            ) from error

    def gone(self, path: Path) -> ExecutionError:
        """What to raise where something of what is finished is not there any more."""
        return ExecutionError(
            f"{path} is gone: something has removed it while {self.results} was written. Make the same call "
            "again, and leave the folder to it: what is still there is kept, and the rest is computed."
        )

    def is_done(self) -> bool:
        """Whether the results are there, as far as their document says."""
        try:
            return bool(json.loads((self.results / "results.json").read_text())["experiment"] == self.digest)
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def finished(self) -> Results | None:
        """The results, if the whole experiment is done and its files are sound; where they are not, it is not
        done any more, with a warning.

        Raises:
            ExecutionError: they cannot be read, whatever they hold.
        """
        if not self.is_done():
            return None
        document, tensors = self.results / "results.json", self.results / "results.safetensors"
        with self.disk(reading=True), suppress(FileNotFoundError, ValueError, LookupError, TypeError):
            said = json.loads(document.read_text())
            if said.pop("digest") == digest(said) and said["checksum"] == file_checksum(tensors):
                return Results.load(self.results)
        logger.warning("The results in %s are damaged, or some are gone; they are made anew.", self.results)
        with self.disk():
            document.unlink(missing_ok=True)
        return None


def _words(name: str, value: Any) -> str:
    """One of the values that fix chunks, in words."""
    of = {"chunk": "examples per chunk", "width": "rows per forward"}
    if name == "holds":
        return f"clean values that several chunks need {'held' if value else 'not held'}"
    return f"{value} {of[name]}" if name in of else f"{name} {value}"
