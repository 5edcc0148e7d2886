"""What an experiment gave: outputs, captured values, a table, and where it all came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.engine.binding.checks import check_folder
from vit_mechinterp.engine.files.tensorfiles import file_checksum, read_tensors, replacing, writing
from vit_mechinterp.errors import TensorFileError, suggest
from vit_mechinterp.model.cache import BySite
from vit_mechinterp.spec import Readout
from vit_mechinterp.spec.digest import digest
from vit_mechinterp.spec.readouts import parse_readout

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Captures", "Results", "capture_keys", "save_document"]


class Captures(BySite[Any]):
    """Captured values of one run by site name; TransformerLens spellings find them as well.

    Each is a tensor ``[example, ...]``, or a list of tensors where examples differ in their number of
    selected tokens.

    Args:
        run: the run's name, for messages.
        values: the values by site name.
    """

    def __init__(self, run: str, values: Mapping[str, Tensor | list[Tensor]]) -> None:
        super().__init__(values)
        self.run = run
        self.owner = f"Run {run!r}: "


class _ByRun(dict[str, Captures]):
    """Captures by run; asking for a run that there is not names those that there are."""

    def __missing__(self, run: str) -> Captures:
        raise KeyError(_no_run(run, tuple(self)))


def _no_run(run: str, runs: Sequence[str]) -> str:
    return f"There is no run {run!r}.{suggest(run, runs)} Runs: {', '.join(runs)}."


@dataclass(frozen=True)
class Results:
    """Outputs of every run on every example.

    Args:
        logits: the model's output, ``[run, example, *output]``, float32 (what it is: ``vit.layout.output``);
            where the experiment has a readout, what it keeps, ``[run, example, *readout]``.
        run_names: names of the runs, in order; those without output (``Run.output``) are not among them.
        captures: captured values by run (these too) and site, in the model's dtype.
        labels: integer columns of the data by name, for tables.
        provenance: digests of spec, model, data and tensors; chunks; versions.
    """

    logits: Float[Tensor, "run example *output"]
    run_names: tuple[str, ...]
    captures: Mapping[str, Captures]
    labels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "captures", _ByRun(self.captures))

    def __getitem__(self, run: str) -> Float[Tensor, "example *output"]:
        """The outputs of one run, or what was kept of them."""
        if run not in self.run_names and run in self.captures:
            shown = f" What it captured is captures[{run!r}]." if self.captures[run] else ""
            raise KeyError(f"Run {run!r} has no output (output=False).{shown}")
        if run not in self.run_names:
            raise KeyError(_no_run(run, self.run_names or tuple(self.captures)))
        return self.logits[self.run_names.index(run)]

    @property
    def readout(self) -> Readout | None:
        """What was kept of every output; None where all of it was."""
        document = self.provenance.get("readout")
        return None if document is None else parse_readout(document)

    def to_pandas(self) -> pd.DataFrame:
        """One row per run and example: the output (``logit_0``, ...), the prediction, and the data's labels.

        With a readout, what it keeps: ``cross_entropy``, or ``logit_`` and class or column, without a
        prediction. Outputs of more than two axes are left out; read them from ``logits``.
        """
        import pandas as pd

        n_runs, n_examples = self.logits.shape[:2]
        table: dict[str, Any] = {
            "run": [name for name in self.run_names for _ in range(n_examples)],
            "example": list(range(n_examples)) * n_runs,
        }
        if (readout := self.readout) is not None:
            kept = self.logits.reshape(-1, len(readout.names))
            table |= {name: kept[:, i].numpy() for i, name in enumerate(readout.names)}
        elif self.logits.ndim == 3:
            flat = self.logits.flatten(0, 1)
            table |= {f"logit_{i}": flat[:, i].numpy() for i in range(flat.shape[1])}
            table["prediction"] = flat.argmax(dim=1).numpy()
        for name, values in self.labels.items():
            table[name] = list(values) * n_runs
        return pd.DataFrame(table)

    def save(self, folder: str | Path) -> Path:
        """Write tensors (safetensors), table (parquet and CSV) and provenance (JSON) into a folder.

        Every file takes its name once it is complete, so a folder of older results is replaced, never mixed.
        """
        check_folder(folder, "folder")
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {"logits": self.logits}
        index: list[dict[str, Any]] = []
        for n, (run, captures) in enumerate(self.captures.items()):
            for site, value in captures.items():
                parts = value if isinstance(value, list) else [value]
                keys = capture_keys(n, site, len(value) if isinstance(value, list) else None)
                tensors |= dict(zip(keys, parts, strict=True))
                index.append({"run": run, "site": site, "keys": keys, "ragged": isinstance(value, list)})
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with writing(path / "results.safetensors", layout) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        save_document(path, self.run_names, tuple(self.captures), index, self.labels, self.provenance)
        self.save_table(path)
        return path

    def save_table(self, folder: str | Path) -> Path:
        """Write the table alone, as ``results.parquet`` and ``results.csv``."""
        path = Path(folder)
        table = self.to_pandas()
        with replacing(path / "results.parquet") as file:
            table.to_parquet(file)
        with replacing(path / "results.csv") as file:
            table.to_csv(file, index=False)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read what `save` wrote. Tensors are mapped: their bytes are read when they are looked at.

        Raises:
            TensorFileError: a file is missing or damaged.
        """
        from safetensors import SafetensorError

        path = Path(folder)
        try:
            document = json.loads((path / "results.json").read_text())
            tensors, _ = read_tensors(path / "results.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise TensorFileError(f"{path} holds no readable results: {error}.") from None
        try:
            every = document["every_run" if "every_run" in document else "runs"]
            captures: dict[str, dict[str, Tensor | list[Tensor]]] = {run: {} for run in every}
            for entry in document["captures"]:
                parts = [tensors[key] for key in entry["keys"]]
                captures[entry["run"]][entry["site"]] = parts if entry["ragged"] else parts[0]
            return cls(
                logits=tensors["logits"],
                run_names=tuple(document["runs"]),
                captures={run: Captures(run, values) for run, values in captures.items()},
                labels=document["labels"],
                provenance=document["provenance"],
            )
        except (LookupError, TypeError) as error:
            raise TensorFileError(f"{path} holds no readable results: {error!r}.") from None

    def __repr__(self) -> str:
        captured = sum(len(c) for c in self.captures.values())
        without = len(self.captures.keys() - set(self.run_names))
        more = f", {without} runs without output" if without else ""
        n_examples = self.logits.shape[1]
        return f"Results({len(self.run_names)} runs x {n_examples} examples{more}, {captured} captures)"


def capture_keys(run: int, site: str, parts: int | None) -> list[str]:
    """Names of a capture's tensors in the file of results: one, or one per example where they are ragged."""
    key = f"capture.{run}.{site}"
    return [key] if parts is None else [f"{key}.{i}" for i in range(parts)]


def save_document(
    folder: Path,
    runs: Sequence[str],
    every_run: Sequence[str],
    captures: Sequence[Mapping[str, Any]],
    labels: Mapping[str, Sequence[int]],
    provenance: Mapping[str, Any],
    **more: Any,
) -> None:
    """Write ``results.json``, which says what the tensors beside it are: outputs of ``runs``, captures of
    ``every_run``."""
    document = {
        "runs": list(runs),
        "every_run": list(every_run),
        "captures": list(captures),
        "labels": {name: list(map(int, values)) for name, values in labels.items()},
        "provenance": dict(provenance),
        "checksum": file_checksum(folder / "results.safetensors"),
        **more,
    }
    plain = json.loads(json.dumps(document))
    with replacing(folder / "results.json") as file:
        file.write(json.dumps({**plain, "digest": digest(plain)}, indent=2).encode())
