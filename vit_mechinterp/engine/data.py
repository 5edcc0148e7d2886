"""Columns of examples: images, labels, tokens and boxes, from a dataset or from plain tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.errors import DataError, suggest
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["Data"]

Value = TypeVar("Value")


class Data:
    """A HuggingFace ``Dataset``, or a mapping of columns, read the way the engine needs it.

    Image columns hold PIL images, which pass through the model's own preprocessing, or float tensors
    ``[3, height, width]`` (or one stacked ``[n, 3, height, width]``), which are taken as they are.

    Raises:
        DataError: columns of unequal length, or no columns at all.
    """

    def __init__(self, data: Any, vit: HookedViT) -> None:
        self.vit = vit
        self._data = data
        self._once: dict[Any, Any] = {}
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
        if not self.columns or self.n == 0:
            raise DataError("The data has no examples.")

    def once(self, key: tuple[str, ...], make: Callable[[], Value]) -> Value:
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

    def values(self, column: str, examples: Iterable[int] | None = None) -> Iterator[Any]:
        """Raw entries of a column, of all examples or of some, one at a time."""
        indices = range(self.n) if examples is None else examples
        if isinstance(self._data, Mapping):
            entries = self._data[column]
            return (entries[i] for i in indices)
        rows = self._data.select_columns([column])
        return (rows[int(i)][column] for i in indices)

    def images(self, column: str, examples: Sequence[int]) -> Float[Tensor, "example 3 height width"]:
        """Images of some examples as the model takes them, on the model's device.

        Raises:
            DataError: an entry is neither a PIL image nor a tensor of the model's input size.
        """
        entries = list(self.values(column, examples))
        if all(map(_is_picture, entries)):
            batch = self.vit.preprocess(entries)
            size = self.vit.layout.tokens.input_shape
            if tuple(batch.shape[1:]) != size:
                raise DataError(
                    f"Column {column!r}: the model's preprocessing makes {tuple(batch.shape[1:])} of its "
                    f"images, and the model takes {size}. Give tensors, or repair the preprocessing."
                )
        else:
            batch = torch.stack([self._tensor(column, i, e) for i, e in zip(examples, entries, strict=True)])
        return batch.to(self.vit.device, self.vit.dtype)

    def check_images(self, column: str) -> None:
        """Preprocess one image, and look at every entry that costs nothing to look at.

        Raises:
            DataError: an entry is neither a PIL image nor a tensor of the model's input size, or both occur.
        """
        # Images in a Dataset are decoded when they are read, and their type is known beforehand.
        decoded = type(getattr(self._data, "features", {}).get(column)).__name__ == "Image"
        pictures = set()
        for example, entry in enumerate(self.values(column, range(1) if decoded else None)):
            pictures.add(_is_picture(entry))
            if not _is_picture(entry):
                self._tensor(column, example, entry)
        if len(pictures) > 1:
            raise DataError(
                f"Column {column!r} mixes PIL images and tensors; a column holds one or the other."
            )
        self.images(column, [0])

    def _tensor(self, column: str, example: int, entry: Any) -> Tensor:
        """An entry that is no PIL image, as the tensor that the model takes."""
        size = self.vit.layout.tokens.input_shape
        tensor = _array(entry)
        found = "something else" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        if tensor is None or tuple(tensor.shape) != size or not tensor.is_floating_point():
            raise DataError(
                f"Column {column!r}, example {example} is no image of this model: {found}. It takes PIL "
                f"images, which its own preprocessing resizes, or float tensors {size}, which are taken "
                "as they are."
            )
        return tensor

    def original_sizes(self, column: str) -> list[tuple[int, int]] | None:
        """``(width, height)`` of every PIL image of a column; None if it holds tensors in model pixels."""
        sizes = []
        for entry in self.values(column):
            if not _is_picture(entry):
                return None
            sizes.append((int(entry.size[0]), int(entry.size[1])))
        return sizes

    def integers(self, column: str) -> list[list[int]]:
        """A column of integers or of lists of integers, one list per example.

        Raises:
            DataError: an entry holds something else.
        """
        whole = self._data[column] if isinstance(self._data, Mapping) else None
        if isinstance(whole, Tensor) and whole.ndim in (1, 2) and not whole.is_floating_point():
            return [[int(i) for i in row] for row in whole.reshape(self.n, -1).tolist()]
        rows: list[list[int]] = []
        for example, entry in enumerate(self.values(column)):
            array = _array(entry)
            counts = array is not None and not (array.is_floating_point() or array.is_complex())
            if array is None or array.ndim > 1 or not (counts or array.numel() == 0):
                raise DataError(
                    f"Column {column!r}, example {example}: {entry!r} is not an integer or a list of them."
                )
            rows.append([int(i) for i in array.reshape(-1).tolist()])
        return rows

    def boxes(self, column: str) -> list[tuple[float, float, float, float]]:
        """A column of pixel boxes ``(x0, y0, x1, y1)``.

        Raises:
            DataError: an entry is not four numbers with x0 < x1 and y0 < y1.
        """
        rows = []
        for example, entry in enumerate(self.values(column)):
            array = _array(entry)
            box = [] if array is None else [float(edge) for edge in array.reshape(-1).tolist()]
            if len(box) != 4 or box[0] >= box[2] or box[1] >= box[3]:
                raise DataError(
                    f"Column {column!r}, example {example}: {entry!r} is no box; a box is (x0, y0, x1, y1) "
                    "in pixels, half-open, with x0 < x1 and y0 < y1."
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
        """SHA-256 over the contents of some columns, in order of name."""
        digest = hashlib.sha256(str(self.n).encode())
        for column in sorted(set(columns)):
            digest.update(column.encode())
            for entry in self.values(column):
                digest.update(_bytes_of(entry))
        return digest.hexdigest()


def _is_picture(entry: Any) -> bool:
    """Whether an entry is a PIL image (PIL itself need not be imported)."""
    return hasattr(entry, "convert")


def _array(entry: Any) -> Tensor | None:
    """An entry as a tensor; None if it holds no numbers, or lists of unequal length."""
    if isinstance(entry, Tensor):
        return entry
    try:
        return torch.as_tensor(np.asarray(entry))
    except (TypeError, ValueError):
        return None


def _bytes_of(entry: Any) -> bytes:
    if _is_picture(entry):
        # The pixels of a palette image are indices, which say nothing without the palette.
        picture = entry.convert("RGBA") if entry.mode == "P" else entry
        return f"{entry.mode}{entry.size}".encode() + bytes(picture.tobytes())
    if isinstance(entry, Tensor):
        raw = entry.detach().cpu().contiguous()
        return f"{tuple(raw.shape)}{raw.dtype}".encode() + raw.reshape(-1).view(torch.uint8).numpy().tobytes()
    try:
        array = np.asarray(entry)
    except ValueError:
        return repr(entry).encode()
    if array.dtype == object:
        return repr(entry).encode()
    return f"{array.shape}{array.dtype.kind}".encode() + np.ascontiguousarray(array).tobytes()
