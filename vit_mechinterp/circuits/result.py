"""What a circuit gives back: a table, its figures, and where the numbers come from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_mechinterp.engine.results.provenance import versions
from vit_mechinterp.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["CircuitResult", "package_versions", "provenance"]

Draw = Callable[["CircuitResult"], Mapping[str, "Figure"]]

_PACKAGES = ("vit-mechinterp", "torch", "timm", "transformers", "datasets", "numpy", "pandas", "safetensors")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class CircuitResult:
    """The outcome of one circuit.

    Attributes:
        name: the circuit, as a file name (``"attention_stages"``).
        table: every number, in long form: one row per observation, plain columns; the index carries nothing.
        provenance: what the numbers depend on, see `provenance`.
        summary: the few numbers or words a reader wants first.
        description: what was done and how to read it, in plain text; blank lines part paragraphs.
        title: heading of the section; by default made from the name.
        captions: figure name to what the figure shows.
        draw: makes the figures from the result, so that a figure never holds a number the table lacks.
        tensors: learned tensors (rotations, gates, probes), for reuse by name in a later spec.
        pictures: figures as PNG files by name, of a result that was loaded; drawn ones come first.
    """

    name: str
    table: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, float | int | str] = field(default_factory=dict)
    description: str = ""
    title: str = ""
    captions: Mapping[str, str] = field(default_factory=dict)
    draw: Draw | None = field(default=None, repr=False)
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    pictures: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _check_file_name(self.name, "circuit")
        if not self.title:
            object.__setattr__(self, "title", self.name.replace("_", " ").capitalize())

    def figures(self) -> dict[str, Figure]:
        """Draw and return the figures by name; empty for a circuit without figures."""
        figures = dict(self.draw(self)) if self.draw is not None else {}
        for name in figures:
            _check_file_name(name, "figure")
        return figures

    def save(self, folder: str | Path) -> Path:
        """Write everything into ``folder`` (made if need be) and return its path.

        ``table.parquet`` and ``table.csv`` hold the table; ``result.json`` name, description and summary;
        ``provenance.json`` the provenance; ``<figure>.png`` and ``<figure>.pdf`` each figure;
        ``tensors.safetensors`` the tensors, if there are any. ``result.json`` comes last: a folder that
        saving was stopped in holds no result, and not parts of two.
        """
        from vit_mechinterp.figures.style import save_figure

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("result.json", "tensors.safetensors"):  # of another result
            (folder / name).unlink(missing_ok=True)
        self.table.to_parquet(folder / "table.parquet", index=False)
        self.table.to_csv(folder / "table.csv", index=False)
        figures = self.figures()
        result = {
            "name": self.name,
            "title": self.title,
            "description": self.description,
            "summary": self.summary,
            "captions": self.captions,
            "figures": list(dict.fromkeys([*figures, *self.pictures])),
        }
        _write_json(folder / "provenance.json", self.provenance)
        if self.tensors:
            from safetensors.torch import save_file

            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
            save_file(whole, folder / "tensors.safetensors")
        for name, figure in figures.items():
            save_figure(figure, folder / name)
        for name in set(self.pictures) - set(figures):
            _check_file_name(name, "figure")
            (folder / f"{name}.png").write_bytes(self.pictures[name])
        _write_json(folder / "result.json", result)
        return folder

    @classmethod
    def load(cls, folder: str | Path, draw: Draw | None = None) -> CircuitResult:
        """Read what `save` wrote.

        Args:
            folder: a folder written by `save`.
            draw: the circuit's own drawing function, to draw the figures anew; without it the result has
                those that `save` left there, as `pictures`.

        Raises:
            DataError: a file is missing or unreadable.
        """
        import pandas as pd

        folder = Path(folder)
        result = _read_json(folder / "result.json")
        try:
            table = pd.read_parquet(folder / "table.parquet")
            tensors: dict[str, Tensor] = {}
            if (folder / "tensors.safetensors").is_file():
                from safetensors.torch import load_file

                tensors = load_file(folder / "tensors.safetensors")
            return cls(
                **{key: result[key] for key in ("name", "title", "description", "summary", "captions")},
                table=table,
                provenance=_read_json(folder / "provenance.json"),
                draw=draw,
                tensors=tensors,
                pictures={} if draw is not None else _pictures(folder, result),
            )
        except DataError:
            raise
        except Exception as error:  # pyarrow, safetensors and json each raise types of their own
            raise DataError(
                f"{folder} does not hold a readable circuit result ({type(error).__name__}: {error}). "
                "Save the result again."
            ) from error


def _pictures(folder: Path, result: Mapping[str, Any]) -> dict[str, bytes]:
    """The figures that `save` left in a folder, in their order; those that have been taken away are not."""
    names = result.get("figures", sorted(path.stem for path in folder.glob("*.png")))
    files = {name: folder / f"{name}.png" for name in names}
    return {name: file.read_bytes() for name, file in files.items() if file.is_file()}


def provenance(*sources: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Merge where numbers come from into one record that JSON can hold.

    Args:
        sources: records to merge, such as ``results.provenance`` of every execution in a circuit. Equal
            values are kept once; values that differ between sources are listed in order of appearance.
        facts: further entries (``spec_digest``, ``model_fingerprint``, ``data_fingerprint``, ``seed``, ...);
            an entry of None is left out, and an entry here overrides the sources.

    Returns:
        The merged record and, under ``versions``, Python's and the packages' versions. It adds no time, no
        path and no name of a machine, so equal work gives an equal record.
    """
    merged: dict[str, Any] = {}
    seen: dict[str, list[Any]] = {}
    for source in sources:
        for key, value in source.items():
            values = seen.setdefault(key, [])
            plain = _plain(value)
            if plain not in values:
                values.append(plain)
    for key, values in seen.items():
        merged[key] = values[0] if len(values) == 1 else values
    merged.update({key: _plain(value) for key, value in facts.items() if value is not None})
    merged["versions"] = package_versions()
    return merged


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages whose versions can change a number."""
    return versions(_PACKAGES)


def _plain(value: Any) -> Any:
    """Turn numpy scalars, tuples, paths and the like into what JSON holds; NaN and infinity become null."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case set() | frozenset():
            return sorted(_plain(item) for item in value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path.parent} is not the folder of a circuit result: it has no {path.name}. "
            "Give a folder that CircuitResult.save wrote."
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}). Save the result again.") from error
    return content


def _check_file_name(name: str, what: str) -> None:
    if not _FILE_NAME.fullmatch(name):
        raise DataError(
            f"{name!r} cannot name a {what}: it becomes a file name, so it may hold letters, digits, '.', "
            "'_' and '-' and must start with a letter or digit."
        )
