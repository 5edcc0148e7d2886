"""The examples of one experiment on one model: columns, and their images as the model takes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.engine.inputs.columns import Columns
from vit_mechinterp.engine.inputs.decodable import damaged_files, damaged_picture, said_of_damaged
from vit_mechinterp.engine.inputs.entries import as_array, described, is_picture
from vit_mechinterp.engine.inputs.stored import (
    first_null,
    oriented_size,
    stored_bytes,
    stored_fingerprint,
    stored_images,
)
from vit_mechinterp.errors import DataError
from vit_mechinterp.model.hooked import HookedViT

if TYPE_CHECKING:
    from vit_mechinterp.engine.inputs.ahead import Ahead, Request

__all__ = ["Data"]


class Data(Columns):
    """Columns with images, read the way the engine needs them.

    Image columns hold PIL images, which pass through the model's own preprocessing, or float tensors
    ``[3, height, width]`` (or one stacked ``[n, 3, height, width]``), which are taken as they are. No pixels
    are kept.

    Args:
        data: the dataset or the columns.
        vit: the model that takes the images.
        progress: show a bar wherever going through a column takes longer than two seconds.

    Raises:
        DataError: columns of unequal length, no columns at all, several splits, or a dataset without length.
    """

    def __init__(self, data: Any, vit: HookedViT, *, progress: bool = False) -> None:
        super().__init__(data, progress=progress)
        self.vit = vit
        self._ahead: Ahead | None = None

    def images(self, column: str, examples: Sequence[int]) -> Float[Tensor, "example 3 height width"]:
        """Images of some examples as the model takes them, on the model's device.

        Raises:
            DataError: an entry is neither a PIL image nor a tensor of the model's input size.
        """
        batch: Tensor | None = None
        if self._ahead is not None and not self._is_stacked(column):
            batch = self._ahead.take(column, examples)
        if batch is None:
            batch = self._batch(column, examples)
        return batch.to(self.vit.device, self.vit.dtype, non_blocking=True)

    @contextmanager
    def ahead(self, requests: Iterable[Request], most: int | None = None) -> Iterator[None]:
        """Decode and preprocess in the background what will be asked for, in order, for a ``with`` block.

        Stacked tensors need no preparing, and are left alone. ``most`` bytes wait at most.
        """
        from vit_mechinterp.engine.inputs.ahead import AHEAD_BYTES, Ahead, workers_for

        nbytes = 4 * int(torch.Size(self.vit.layout.tokens.input_shape).numel())
        workers = workers_for(self.vit.device.type, shared=isinstance(self._data, Mapping))
        wanted = (request for request in requests if not self._is_stacked(request[0]))
        before = self._ahead
        most = AHEAD_BYTES if most is None else most
        self._ahead = Ahead(self._ready, wanted, nbytes, workers, most)
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = before

    def _is_stacked(self, column: str) -> bool:
        return isinstance(self._data, Mapping) and isinstance(self._data[column], Tensor)

    def _ready(self, column: str, examples: Sequence[int]) -> Tensor:
        """A batch in memory that the model's device copies from without holding anybody up."""
        batch = self._batch(column, examples).to(self.vit.dtype)
        return batch.pin_memory() if self.vit.device.type == "cuda" else batch

    def _batch(self, column: str, examples: Sequence[int]) -> Tensor:
        entries = [self._entry(column, example) for example in examples]
        pictures = list(map(is_picture, entries))
        if all(pictures):
            batch = self.vit.preprocess(entries)
            size = self.vit.layout.tokens.input_shape
            if tuple(batch.shape[1:]) != size:
                raise DataError(
                    f"Column {column!r}: the model's preprocessing makes {tuple(batch.shape[1:])} of its "
                    f"images, and the model takes {size}. Give tensors, or repair the preprocessing."
                )
            return batch
        if any(pictures):
            odd = pictures.index(False)
            self._tensor(column, examples[odd], entries[odd])
            raise DataError(_mixed(column))
        return torch.stack([self._tensor(column, i, e) for i, e in zip(examples, entries, strict=True)])

    def _entry(self, column: str, example: int) -> Any:
        """One entry, decoded if it is an encoded image."""
        try:
            return next(self.values(column, [example]))
        except (OSError, SyntaxError) as error:  # what PIL raises for damaged files
            raise DataError(
                f"Column {column!r}, example {example}: the image cannot be decoded ({error})."
            ) from error

    def check_images(self, column: str, *, decode: bool = True) -> None:
        """Preprocess one image, and look at every entry: encoded images are decoded once per process, unless
        ``decode`` is off.

        Raises:
            DataError: an image cannot be decoded or is not finite (all such are named), an entry is neither a
                PIL image nor a tensor of the model's input size, or both occur.
        """
        stored = stored_images(self._data, column)
        if stored is not None and decode:
            self._check_files(column, stored)
        elif stored is None:
            pictures, damaged = set(), {}
            for example, entry in enumerate(self._scan(column, "looking at")):
                pictures.add(is_picture(entry))
                if not is_picture(entry):
                    if few := _not_finite(self._tensor(column, example, entry).to(self.vit.dtype)):
                        damaged[example] = few
                elif decode and (trouble := damaged_picture(entry)):
                    damaged[example] = trouble
            if len(pictures) > 1:
                raise DataError(_mixed(column))
            if damaged:
                trouble = "cannot be decoded" if True in pictures else "hold what is no finite number"
                raise DataError(said_of_damaged(damaged, column, self.n, trouble))
        self.images(column, [0])

    def _check_files(self, column: str, stored: Any) -> None:
        missing = first_null(stored, column)
        if missing is not None:
            self._tensor(column, missing, None)
        fingerprint = stored_fingerprint(self._data, column)
        damaged = damaged_files(stored, column, fingerprint, progress=self._progress)
        if damaged:
            raise DataError(said_of_damaged(damaged, column, self.n))

    def _tensor(self, column: str, example: int, entry: Any) -> Tensor:
        """An entry that is no PIL image, as the tensor that the model takes."""
        size = self.vit.layout.tokens.input_shape
        tensor = as_array(entry)
        found = described(entry if tensor is None else tensor)
        if tensor is None or tuple(tensor.shape) != size or not tensor.is_floating_point():
            raise DataError(
                f"Column {column!r}, example {example} is no image of this model: {found}. It takes PIL "
                f"images, which its own preprocessing resizes, or float tensors {size}, which are taken "
                f"as they are.{_may_be_encoded(entry, column)}"
            )
        return tensor

    def original_sizes(self, column: str) -> list[tuple[int, int]] | None:
        """``(width, height)`` of every PIL image of a column; None if it holds tensors in model pixels."""
        sizes = []
        stored = stored_images(self._data, column)
        if stored is not None:
            self._check_files(column, stored)
            for example, entry in enumerate(self._scan(column, "sizes of", stored)):
                encoded = stored_bytes(entry)
                if encoded is None:
                    # It is missing, or lies elsewhere, and the dataset knows where.
                    picture = next(self.values(column, [example]))
                    if not is_picture(picture):
                        self._tensor(column, example, picture)
                    sizes.append((int(picture.size[0]), int(picture.size[1])))
                else:
                    sizes.append(oriented_size(encoded))
            return sizes
        for entry in self._scan(column, "sizes of"):
            if not is_picture(entry):
                return None
            sizes.append((int(entry.size[0]), int(entry.size[1])))
        return sizes

    def image_digest(self, column: str, examples: Sequence[int] | None = None) -> str:
        """SHA-256 over what decides the model's input: a column's images, all of them or those of some
        examples, and how they are preprocessed."""
        chosen = None if examples is None else tuple(examples)
        return self.once(("image digest", column, chosen), lambda: self._image_digest(column, chosen))

    def _image_digest(self, column: str, examples: Sequence[int] | None) -> str:
        preprocessing = ""
        if any(map(is_picture, self.values(column, [0]))):
            preprocessing = json.dumps(self.vit.preprocess.config, sort_keys=True, default=str)
        return hashlib.sha256(f"{self.digest(column, examples)} {preprocessing}".encode()).hexdigest()


def _not_finite(tensor: Tensor) -> str:
    """How many numbers of an image are infinite or none, in words; empty where all are finite."""
    wrong = int((~torch.isfinite(tensor)).sum())
    return f"{wrong} of {tensor.numel()} numbers" if wrong else ""


def _may_be_encoded(entry: Any, column: str) -> str:
    """What to do where an entry is an image file, or the path of one, that nobody decodes."""
    encoded = isinstance(entry, (bytes, str)) or (isinstance(entry, Mapping) and "bytes" in entry)
    cast = f" If it is an image file, let it be decoded: data.cast_column({column!r}, datasets.Image())."
    return cast if encoded else ""


def _mixed(column: str) -> str:
    return f"Column {column!r} mixes PIL images and tensors; a column holds one or the other."
