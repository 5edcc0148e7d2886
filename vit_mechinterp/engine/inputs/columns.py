"""Columns of examples: numbers, boxes and labels, and what they contain as a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.engine.inputs.entries import as_array, bytes_of, described
from vit_mechinterp.engine.inputs.stored import refuse_other_datasets, stored_bytes, stored_images
from vit_mechinterp.errors import DataError, suggest

__all__ = ["Columns"]

Value = TypeVar("Value")

_PROGRESS_DELAY = 2.0
"""Seconds after which a progress bar appears."""


class Columns:
    """A HuggingFace ``Dataset``, or a mapping of columns, read entry by entry.

    Args:
        data: the dataset or the columns.
        progress: show a bar wherever going through a column takes longer than two seconds.

    Raises:
        DataError: columns of unequal length, no columns at all, several splits, or a dataset without length.
    """

    def __init__(self, data: Any, *, progress: bool = False) -> None:
        self._data = data
        self._progress = progress
        self._once: dict[Any, Any] = {}
        refuse_other_datasets(data)
        if isinstance(data, Mapping):
            self.columns: list[str] = list(data)
            unsized = [name for name, column in data.items() if not hasattr(column, "__len__")]
            if unsized:
                raise DataError(f"Not columns, but single values: {', '.join(unsized)}.")
            lengths = {name: len(column) for name, column in data.items()}
            if len(set(lengths.values())) > 1:
                raise DataError(
                    f"Columns of unequal length: {lengths}. Every column has one entry per example."
                )
            self.n = next(iter(lengths.values()), 0)
        elif hasattr(data, "column_names") and hasattr(data, "__getitem__"):
            self.columns = list(data.column_names)
            self.n = len(data)
        else:
            raise DataError(f"Data is a datasets.Dataset or a mapping of columns, not {type(data).__name__}.")
        if odd := [name for name in self.columns if not isinstance(name, str)]:
            raise DataError(f"Columns are called by strings, not {', '.join(map(repr, odd))}.")
        if not self.columns:
            raise DataError("The data has no columns. Runs take images from one: 'base', if they name none.")
        if self.n == 0:
            raise DataError("The data has no examples: its columns are empty.")

    def once(self, key: tuple[object, ...], make: Callable[[], Value]) -> Value:
        """What ``make`` returns, made once per key: many runs select by the same columns."""
        if key not in self._once:
            self._once[key] = make()
        value: Value = self._once[key]
        return value

    def require(self, column: str, wanted_by: str) -> None:
        """Raise DataError, naming close matches, unless there is such a column."""
        if column not in self.columns:
            raise DataError(
                f"{wanted_by}: the data has no column {column!r}.{suggest(column, self.columns)} "
                f"Columns: {', '.join(self.columns)}."
            )

    def column(self, column: str) -> Any:
        """A column of a mapping as it was given; None for a dataset."""
        return self._data[column] if isinstance(self._data, Mapping) else None

    def encoded(self, column: str) -> Any:
        """A dataset's image column as encoded files, undecoded; None if the column is something else."""
        return stored_images(self._data, column)

    def values(self, column: str, examples: Iterable[int] | None = None) -> Iterator[Any]:
        """Raw entries of a column, of all examples or of some, one at a time."""
        indices = range(self.n) if examples is None else examples
        if isinstance(self._data, Mapping):
            entries = self._data[column]
            return (entries[i] for i in indices)
        rows = self.once(("rows", column), lambda: self._data.select_columns([column]))
        return (rows[int(i)][column] for i in indices)

    def _scan(
        self, column: str, doing: str, stored: Any = None, examples: Sequence[int] | None = None
    ) -> Iterator[Any]:
        """Entries of a column (or of its stored form), all or some, behind a progress bar."""
        chosen = range(self.n) if examples is None else examples
        entries = self.values(column, chosen) if stored is None else (stored[i][column] for i in chosen)
        yield from tqdm(
            entries, f"{doing} {column}", total=len(chosen), delay=_PROGRESS_DELAY, disable=not self._progress
        )

    def integers(self, column: str, where: str = "") -> list[list[int]]:
        """A column of integers or of lists of integers, one list per example.

        ``where`` is what messages name: run, operation and site.

        Raises:
            DataError: an entry holds something else.
        """
        whole = self._data[column] if isinstance(self._data, Mapping) else None
        if isinstance(whole, Tensor) and whole.ndim in (1, 2) and not whole.is_floating_point():
            return [[int(i) for i in row] for row in whole.reshape(self.n, -1).tolist()]
        rows: list[list[int]] = []
        for example, entry in enumerate(self._scan(column, "reading")):
            array = as_array(entry)
            counts = array is not None and not (array.is_floating_point() or array.is_complex())
            if array is None or array.ndim > 1 or not (counts or array.numel() == 0):
                raise DataError(
                    f"{_placed(column, where)}, example {example}: {described(entry)} is not an integer or a "
                    "list of them. Name another column, or convert this one to integers."
                )
            rows.append([int(i) for i in array.reshape(-1).tolist()])
        return rows

    def one_integer(self, column: str, where: str) -> list[int]:
        """A column of one integer per example; ``where`` is what messages name.

        Raises:
            DataError: there is no such column, or an entry holds something else.
        """
        self.require(column, where)
        rows = self.integers(column, where)
        for example, row in enumerate(rows):
            if len(row) != 1:
                raise DataError(
                    f"{_placed(column, where)}, example {example}: {row} is not one integer per example. "
                    "Name a column that holds one."
                )
        return [row[0] for row in rows]

    def boxes(self, column: str, where: str = "") -> list[tuple[float, float, float, float]]:
        """A column of pixel boxes ``(x0, y0, x1, y1)``; ``where`` is what messages name.

        Raises:
            DataError: an entry is not four numbers with x0 < x1 and y0 < y1.
        """
        rows = []
        for example, entry in enumerate(self._scan(column, "reading")):
            array = as_array(entry)
            box = [] if array is None else [float(edge) for edge in array.reshape(-1).tolist()]
            if len(box) != 4 or box[0] >= box[2] or box[1] >= box[3]:
                raise DataError(
                    f"{_placed(column, where)}, example {example}: {described(entry)} is no box; a box is "
                    "(x0, y0, x1, y1) in pixels, half-open, with x0 < x1 and y0 < y1."
                )
            rows.append((box[0], box[1], box[2], box[3]))
        return rows

    def labels(self) -> dict[str, list[int]]:
        """Columns called ``label`` or ``..._label`` that hold one integer per example."""
        found: dict[str, list[int]] = {}
        for name in self.columns:
            if name == "label" or name.endswith("_label"):
                try:
                    rows = self.integers(name)
                except DataError:
                    continue
                if all(len(row) == 1 for row in rows):
                    found[name] = [row[0] for row in rows]
        return found

    def fingerprint(self, columns: Sequence[str]) -> str:
        """SHA-256 over the contents of some columns, in order of name.

        Images of a dataset count by their files, so the same pixels in another encoding give another digest.
        """
        digest = hashlib.sha256(str(self.n).encode())
        for column in sorted(set(columns)):
            digest.update(f"{column}:{self.digest(column)}\n".encode())
        return digest.hexdigest()

    def digest(self, column: str, examples: Sequence[int] | None = None) -> str:
        """SHA-256 over the contents of one column, whatever it is called; made once.

        That of some ``examples`` is the digest of a column that holds these alone.
        """
        chosen = range(self.n) if examples is None else tuple(examples)
        return self.once(("digest", column, chosen), lambda: self._digest(column, chosen))

    def _digest(self, column: str, examples: Sequence[int]) -> str:
        digest = hashlib.sha256()
        stored = stored_images(self._data, column)
        if stored is not None:
            digest.update(f"files, mode {stored.features[column].mode}".encode())
        scanned = self._scan(column, "digest of", stored, examples)
        for example, entry in zip(examples, scanned, strict=True):
            encoded = None if stored is None else stored_bytes(entry)
            if encoded is not None:
                digest.update(len(encoded).to_bytes(8, "big") + encoded)
            else:
                whole = entry if stored is None else next(self.values(column, [example]))
                digest.update(bytes_of(whole))
        return digest.hexdigest()


def _placed(column: str, where: str) -> str:
    """How a message begins that blames a column."""
    return f"{where}: column {column!r}" if where else f"Column {column!r}"
