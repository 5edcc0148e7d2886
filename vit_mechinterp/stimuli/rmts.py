"""Relational match to sample: do two pairs of objects show the same relation? (Lepori et al. 2024.)

The display pair stands side by side in the upper left corner, the sample pair anywhere else. The label is 1
if both pairs are "same" or both "different". Images come in fours that share the sample pair's two cells and
show every combination of relations once: image 4g + r has a "same" sample pair for r >= 2, and a "same"
display pair for odd r. "Different" sample pairs cycle through the three kinds of difference, those of the
display pair are drawn; the two pairs are never the same two objects. Image i of a split depends on the seed,
the split, i, and the options alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.stimuli.batches import TaskBatch, TaskGenerator
from vit_mechinterp.stimuli.chunks import CHUNK
from vit_mechinterp.stimuli.columns import RELATIONS, check_count, object_columns, to_dataset
from vit_mechinterp.stimuli.geometry import Geometry
from vit_mechinterp.stimuli.render import Scenes, render, to_image_column
from vit_mechinterp.stimuli.splits import DIFFERENT_KINDS
from vit_mechinterp.stimuli.streams import Stream

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["RMTSBatch", "RMTSGenerator", "display_corners", "rmts", "sample_corners"]

_RELATIONS_OF_FOUR = np.array([(0, 0), (0, 1), (1, 0), (1, 1)])
"""Relations (sample, display) of the four images of a group."""


@dataclass(frozen=True, kw_only=True)
class RMTSBatch(TaskBatch):
    """Images of relational match to sample; along the object axis, the sample pair comes before the display
    pair.

    Attributes:
        relations: 1 same, 0 different, of the sample pair and of the display pair ``[n, 2]``.
    """

    relations: NDArray[np.int64]

    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """Return which images show each combination of relations ``[n]``."""
        return {
            f"sample_{RELATIONS[sample]}_display_{RELATIONS[display]}": (
                (self.relations[:, 0] == sample) & (self.relations[:, 1] == display)
            )
            for sample, display in _RELATIONS_OF_FOUR
        }

    def metadata(self) -> dict[str, NDArray[np.int64]]:
        """Return every column but the image, by the names of the dataset."""
        columns = {
            "label": self.label,
            "sample_relation": self.relations[:, 0],
            "display_relation": self.relations[:, 1],
        }
        return columns | pair_columns(self.shape, self.color, self.box, self.tokens)


def pair_columns(
    shape: NDArray[np.int64], color: NDArray[np.int64], box: NDArray[np.int64], tokens: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    """Name the columns of four objects ``[n, 4, ...]``, the sample pair first."""
    arrays = (shape, color, box, tokens)
    sample = object_columns(*(array[:, :2] for array in arrays))
    return sample | object_columns(*(array[:, 2:] for array in arrays), prefix="display")


def display_corners(geometry: Geometry) -> NDArray[np.int64]:
    """Return the corners (x, y in pixels) of the display pair's cells: ``[2, 2]``."""
    return np.array([[0, 0], [geometry.span * geometry.patch, 0]])


def sample_corners(geometry: Geometry) -> NDArray[np.int64]:
    """Return the corners of all ordered pairs of cells that share no patch with one another or with the
    display pair: ``[pairs, 2, 2]``. A canvas on which two cells fit has room below for two more.
    """
    pairs = geometry.corner_pairs()
    reach = geometry.span * geometry.patch
    clear = ((pairs[..., 0] >= 2 * reach) | (pairs[..., 1] >= reach)).all(axis=-1)
    return np.asarray(pairs[clear])


class RMTSGenerator(TaskGenerator[RMTSBatch]):
    """An endless, addressable sequence of images of one split; options as for `TaskGenerator`."""

    def __init__(self, split: str = "train", **options: Any) -> None:
        super().__init__(split, **options)
        self._reversed = [_reversed_index(pairs) for pairs in self._pairs]
        self._corners = sample_corners(self.geometry)

    def _chunk(self, index: int) -> RMTSBatch:
        stream = Stream(self.seed, "rmts", self.split, index, "scenes")
        n_groups = CHUNK // len(_RELATIONS_OF_FOUR)
        objects = self._objects(stream, index * n_groups + np.arange(n_groups))
        sample = self._corners[stream.below(len(self._corners), n_groups)].repeat(4, axis=0)
        display = np.broadcast_to(display_corners(self.geometry), sample.shape)
        corner = np.concatenate([sample, display], axis=1)
        shift = stream.below(self.geometry.max_shift + 1, CHUNK, 4, 2)
        scenes = Scenes(shape=objects[..., 0], color=objects[..., 1], corner=corner, shift=shift)
        relations = np.tile(_RELATIONS_OF_FOUR, (n_groups, 1))
        return RMTSBatch(
            pixels=render(scenes, self.geometry, Stream(self.seed, "rmts", self.split, index, "pixels")),
            label=(relations[:, 0] == relations[:, 1]).astype(np.int64),
            relations=relations,
            shape=scenes.shape,
            color=scenes.color,
            box=self.geometry.boxes(corner),
            tokens=self.geometry.tokens(corner),
            normalization=self.normalization,
        )

    def _objects(self, stream: Stream, group: NDArray[np.int64]) -> NDArray[np.int64]:
        """Choose the objects of all images of the groups: ``[4 * groups, 4, 2]`` of (shape id, colour id)."""
        n = len(group)
        sizes = np.array([len(pairs) for pairs in self._pairs])
        kind = group % len(DIFFERENT_KINDS)
        chosen = stream.below(sizes[kind], n)
        mirrored = np.array([self._reversed[k][c] for k, c in zip(kind, chosen, strict=True)])
        display_kind = stream.below(len(DIFFERENT_KINDS), n)
        free, other = stream.below(sizes[display_kind], n), stream.excluding(sizes[kind], chosen, mirrored)
        display_chosen = np.where(display_kind == kind, other, free)

        sample = self._different(kind, chosen)
        display = self._different(display_kind, display_chosen)
        kept, display_kept = stream.below(2, n), stream.below(2, n)
        rows = np.arange(n)
        # Two "same" pairs show different objects; the pairs' two objects differ, so the other one will do.
        alike = (display[rows, display_kept] == sample[rows, kept]).all(axis=-1)
        display_kept = np.where(alike, 1 - display_kept, display_kept)
        pairs = [
            [pair, np.repeat(pair[rows, one][:, None], 2, axis=1)]
            for pair, one in ((sample, kept), (display, display_kept))
        ]
        images = [np.concatenate([pairs[0][s], pairs[1][d]], axis=1) for s, d in _RELATIONS_OF_FOUR]
        return np.stack(images, axis=1).reshape(4 * n, 4, 2)

    def _different(self, kind: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.stack([self._pairs[k][c] for k, c in zip(kind, chosen, strict=True)])


def _reversed_index(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every ordered pair, where the list holds it the other way round."""
    place = {pair.tobytes(): index for index, pair in enumerate(pairs)}
    return np.array([place[pair[::-1].tobytes()] for pair in pairs])


def rmts(
    split: str = "train",
    n: int = 6400,
    *,
    seed: int = 0,
    canvas: int = 224,
    patch: int = 16,
    cell: int = 32,
    combinations: str = "256-256-256",
    progress: bool = True,
) -> Dataset:
    """Make images of relational match to sample as a `datasets.Dataset`; half of them are "same".

    Columns: ``base`` (image), ``label`` (1: both pairs show the same relation), ``sample_relation``,
    ``display_relation`` (1 same, 0 different); for each object of the sample pair ``shape_k``, ``color_k``
    (ids), ``box_k`` (its cell as x0, y0, x1, y1, half-open pixels), ``object_k_tokens`` (patch indices,
    row-major, prefix tokens not counted), and for each of the display pair ``display_shape_k``, ...,
    ``display_k_tokens``. The images are those of `RMTSGenerator` with the same options. ``progress`` shows a
    bar if it takes longer than two seconds.

    Raises:
        SpecError: an option does not fit; the message says which do.
    """
    check_count(n, "image")
    generator = RMTSGenerator(
        split, seed=seed, canvas=canvas, patch=patch, cell=cell, combinations=combinations
    )
    batch = generator.batch(0, n)
    return to_dataset({"base": to_image_column(batch.pixels, progress=progress)}, batch.metadata())
