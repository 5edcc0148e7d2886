"""From arrays to a `datasets.Dataset`: one schema for all stimuli.

Integers are int64, boxes and token lists have a fixed length, ``label`` and ``counterfactual_label`` are
classes named "different" and "same", images are PNG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.errors import SpecError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["RELATIONS", "check_count", "object_columns", "to_dataset"]

RELATIONS: tuple[str, str] = ("different", "same")
"""Names of the labels 0 and 1."""


def check_count(n: int, what: str) -> None:
    """Raise SpecError if fewer than one image or pair is asked for."""
    if n < 1:
        raise SpecError(f"n={n}: ask for at least one {what}.")


def object_columns(
    shape: NDArray[np.int64],
    color: NDArray[np.int64],
    box: NDArray[np.int64],
    tokens: NDArray[np.int64],
    *,
    prefix: str = "",
) -> dict[str, NDArray[np.int64]]:
    """Name the columns of objects ``[n, objects, ...]``: ``shape_1, color_1, box_1, object_1_tokens``, then
    those of object 2; with a prefix such as "display", ``display_shape_1``, ..., ``display_1_tokens``.
    """
    start = f"{prefix}_" if prefix else ""
    columns: dict[str, NDArray[np.int64]] = {}
    for index in range(shape.shape[1]):
        columns[f"{start}shape_{index + 1}"] = shape[:, index]
        columns[f"{start}color_{index + 1}"] = color[:, index]
        columns[f"{start}box_{index + 1}"] = box[:, index]
        columns[f"{prefix or 'object'}_{index + 1}_tokens"] = tokens[:, index]
    return columns


def to_dataset(
    images: Mapping[str, Sequence[Any]],
    numbers: Mapping[str, NDArray[np.int64]],
    words: Mapping[str, Sequence[str]] | None = None,
) -> Dataset:
    """Put columns into a dataset.

    Args:
        images: image columns, encoded (see `render.to_image_column`).
        numbers: columns of integers ``[n]`` or ``[n, k]``, in the order in which they are to stand.
        words: columns of strings; one that is named in ``numbers`` too replaces it.
    """
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    words = words or {}
    features: dict[str, Any] = {name: Image() for name in images}
    columns: dict[str, Any] = dict(images)
    for name, values in numbers.items():
        integer = Value("int64")
        features[name] = List(integer, length=values.shape[1]) if values.ndim == 2 else integer
        if name in ("label", "counterfactual_label"):
            features[name] = ClassLabel(names=list(RELATIONS))
        columns[name] = values.tolist()
    for name, strings in words.items():
        features[name] = Value("string")
        columns[name] = list(strings)
    return Dataset.from_dict(columns, features=Features(features))
