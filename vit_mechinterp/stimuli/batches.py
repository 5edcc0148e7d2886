"""What batches of labelled images have in common: pixels, labels, objects and their places."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from vit_mechinterp.stimuli.chunks import ChunkedGenerator
from vit_mechinterp.stimuli.geometry import Geometry
from vit_mechinterp.stimuli.render import NORMALIZATION, Normalization, to_tensor
from vit_mechinterp.stimuli.splits import DIFFERENT_KINDS, check_split, object_pairs

__all__ = ["TaskBatch", "TaskGenerator"]


@dataclass(frozen=True, kw_only=True)
class TaskBatch(ABC):
    """Images of a two-way task with all that is known about them.

    Attributes:
        pixels: uint8 ``[n, 3, canvas, canvas]``.
        label: 1 same, 0 different ``[n]``.
        shape, color: ids of the objects ``[n, objects]``.
        box: their cells as (x0, y0, x1, y1), half-open pixels ``[n, objects, 4]``.
        tokens: their patch indices, row-major, prefix tokens not counted
            ``[n, objects, tokens_per_object]``.
        normalization: how `images` scales pixels.
    """

    pixels: UInt8[np.ndarray, "image channel height width"]
    label: NDArray[np.int64]
    shape: NDArray[np.int64]
    color: NDArray[np.int64]
    box: NDArray[np.int64]
    tokens: NDArray[np.int64]
    normalization: Normalization = NORMALIZATION

    @abstractmethod
    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """Return which images belong to each kind that an accuracy is given for ``[n]``."""

    @abstractmethod
    def metadata(self) -> dict[str, NDArray[np.int64]]:
        """Return every column but the image, by the names of the dataset; words as numbers."""

    def images(self) -> Float[Tensor, "image channel height width"]:
        """Return the images as normalised float32 tensors."""
        return to_tensor(self.pixels, self.normalization)

    def labels(self) -> Int64[Tensor, " image"]:
        """Return the labels as a tensor."""
        return torch.from_numpy(np.ascontiguousarray(self.label))

    def columns(self) -> dict[str, Tensor]:
        """Return all columns as tensors, the images normalised to float32 ``[n, 3, canvas, canvas]``."""
        metadata = {
            name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in self.metadata().items()
        }
        return {"base": self.images(), **metadata}


TaskT = TypeVar("TaskT", bound=TaskBatch)


class TaskGenerator(ChunkedGenerator[TaskT]):
    """An endless, addressable sequence of labelled images of one split.

    Args:
        split: "train", "val", "test" or "test_iid"; each has its own random stream.
        seed: a non-negative integer.
        canvas, patch, cell: sizes in pixels (see `Geometry`); the paper's are 224, 16 and 32.
        combinations: which objects the splits show (see `splits`).
        normalization: how `TaskBatch.images` scales pixels.

    Raises:
        SpecError: an option does not fit; the message says which do.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        canvas: int = 224,
        patch: int = 16,
        cell: int = 32,
        combinations: str = "256-256-256",
        normalization: Normalization = NORMALIZATION,
    ) -> None:
        super().__init__()
        self.split = check_split(split)
        self.seed = seed
        self.geometry = Geometry(canvas, patch, cell)
        self.combinations = combinations
        self.normalization = normalization
        self._pairs = [object_pairs(kind, self.split, combinations) for kind in DIFFERENT_KINDS]

    def batches(self, n: int, batch_size: int, *, start: int = 0) -> Iterator[TaskT]:
        """Yield images ``start .. start + n - 1`` in batches."""
        for first in range(start, start + n, batch_size):
            yield self.batch(first, min(batch_size, start + n - first))
