"""A whole experiment as one document: model, data, tensors and runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, JsonValue, PrivateAttr, model_validator

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.spec.base import SpecModel, as_index, nested
from vit_mechinterp.spec.documents import dump_yaml, load_json, load_yaml, read_text, validate
from vit_mechinterp.spec.readouts import AnyReadout
from vit_mechinterp.spec.runs import Run
from vit_mechinterp.spec.sweeps import Sweep
from vit_mechinterp.spec.tensors import TensorRef

__all__ = ["DataSource", "Experiment"]


class DataSource(SpecModel):
    """Where the examples come from: a folder written by ``datasets.save_to_disk``, or a named stimulus
    generator.

    ``saved`` takes no options; ``stimuli`` passes ``options`` (``n``, ``seed``, ...) to the generator.
    """

    saved: str | None = None
    stimuli: str | None = None
    options: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if bool(self.saved) == bool(self.stimuli):
            given = "both" if self.saved else "neither"
            raise SpecError(
                f"data takes exactly one of 'saved' (a folder) and 'stimuli' (a generator); got {given}."
            )
        if self.saved and self.options:
            raise SpecError(
                f"options belong to 'stimuli'; a saved dataset takes none, got {sorted(self.options)}."
            )
        return self


def _run_or_sweep(value: Any) -> Any:
    if isinstance(value, Mapping):
        return nested(Sweep if "over" in value else Run, dict(value))
    if not isinstance(value, (Run, Sweep)):
        raise SpecError(f"A run is a mapping with a 'name' (a sweep one with 'over'), got {value!r}.")
    return value


def _batch_size(value: Any) -> Any:
    if value == "auto":
        return value
    size = as_index(value) if hasattr(value, "__index__") else 0
    if size == 0:
        raise SpecError(f"batch_size is 'auto' or a positive integer, got {value!r}.")
    return size


RunOrSweep: TypeAlias = Annotated[
    Run | Sweep, BeforeValidator(_run_or_sweep, json_schema_input_type=Run | Sweep)
]
BatchSize: TypeAlias = Annotated[
    int | Literal["auto"], BeforeValidator(_batch_size, json_schema_input_type=int | Literal["auto"])
]


class Experiment(SpecModel):
    """Everything needed to repeat an experiment, in one document.

    ``model`` is a string for ``load``; ``data`` says where the examples come from; ``tensors`` gives files to
    the names that interventions use; ``readout`` says what is kept of every output, all of it if left out.
    Model and data may be left out and given in Python instead. Relative paths are relative to the folder of
    the document (:meth:`resolve`). Equality and digest leave that folder out.
    """

    model: str | None = None
    data: DataSource | None = None
    runs: tuple[RunOrSweep, ...]
    tensors: dict[str, TensorRef] = Field(default_factory=dict)
    batch_size: BatchSize = "auto"
    readout: AnyReadout | None = None
    description: str = ""
    _folder: Path | None = PrivateAttr(default=None)

    # A minimal length of the field would be reported a second time when an entry is malformed.
    @model_validator(mode="after")
    def _some_runs(self) -> Self:
        if not self.runs:
            raise SpecError("The experiment has no runs; a run without interventions, {name: clean}, is one.")
        return self

    @model_validator(mode="after")
    def _tensors_are_files(self) -> Self:
        for name, reference in self.tensors.items():
            if reference.name is not None:
                close = suggest(reference.name, self.tensors)
                raise SpecError(
                    f"tensors.{name} must name a file and a key; it is only a name "
                    f"({reference.name!r}).{close}"
                )
        return self

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Experiment) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def folder(self) -> Path | None:
        """The folder of the document this was read from; None for an experiment made in Python."""
        return self._folder

    def resolve(self, path: str | Path) -> Path:
        """Return ``path``, relative to the document's folder if it has one; ``~`` is the home folder."""
        path = Path(path).expanduser()
        return path if self._folder is None else self._folder / path

    def expand(self, n_layers: int) -> list[Run]:
        """Return all runs for a model of ``n_layers`` blocks, sweeps written out; SpecError if two share a
        name."""
        runs = [
            run
            for entry in self.runs
            for run in ([entry] if isinstance(entry, Run) else entry.runs(n_layers))
        ]
        seen: set[str] = set()
        for run in runs:
            if run.name in seen:
                raise SpecError(f"Two runs of the experiment are called {run.name!r}; names must be unique.")
            seen.add(run.name)
        return runs

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file; SpecError that names file, key and close matches if it is not a valid
        experiment."""
        path = Path(path)
        return cls._placed(validate(cls, load_yaml(read_text(path), str(path)), str(path)), path)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a JSON file; SpecError that names file, key and close matches if it is not a valid
        experiment."""
        path = Path(path)
        return cls._placed(validate(cls, load_json(read_text(path), str(path)), str(path)), path)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Return the document as YAML, defaults left out, and write it to ``path`` if one is given."""
        text = dump_yaml(self.model_dump(mode="json", exclude_defaults=True))
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON schema of the document, with every registered op."""
        return cls.model_json_schema()

    @classmethod
    def _placed(cls, experiment: Self, path: Path) -> Self:
        experiment._folder = path.resolve().parent
        return experiment
