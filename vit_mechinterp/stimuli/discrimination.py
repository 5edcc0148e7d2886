"""The discrimination task: are the two objects in the image the same? (Lepori et al. 2024.)

Images come in pairs that share their two cells: image 2p is a "different" one and image 2p + 1 a "same" one
that shows one of its two objects, chosen at random, twice. The "different" images cycle through the three
kinds of difference. Positions inside the cells and textures are drawn for every image. Image i of a split
depends on the seed, the split, i, and the options alone: not on how many images are made, in which batches,
or by which process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.stimuli.batches import TaskBatch, TaskGenerator
from vit_mechinterp.stimuli.chunks import CHUNK
from vit_mechinterp.stimuli.columns import check_count, object_columns, to_dataset
from vit_mechinterp.stimuli.render import Scenes, render, to_image_column
from vit_mechinterp.stimuli.splits import DIFFERENT_KINDS
from vit_mechinterp.stimuli.streams import Stream

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DiscriminationBatch", "DiscriminationGenerator", "discrimination"]

KIND_NAMES: tuple[str, ...] = ("none", *DIFFERENT_KINDS)
"""Names of ``different_kind``: 0 for same objects, then what differs."""


@dataclass(frozen=True, kw_only=True)
class DiscriminationBatch(TaskBatch):
    """Images of the discrimination task, each with two objects.

    Attributes:
        different_kind: index into ``("none", "both", "shape", "color")`` ``[n]``.
    """

    different_kind: NDArray[np.int64]

    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """Return which images belong to each kind that an accuracy is given for ``[n]``."""
        kinds = {name if name == "none" else f"different_{name}": k for k, name in enumerate(KIND_NAMES)}
        kinds["same"] = kinds.pop("none")
        return {name: self.different_kind == kind for name, kind in kinds.items()}

    def metadata(self) -> dict[str, NDArray[np.int64]]:
        """Return every column but the image, by the names of the dataset; ``different_kind`` as a number."""
        columns = {"label": self.label, "different_kind": self.different_kind}
        return columns | object_columns(self.shape, self.color, self.box, self.tokens)


class DiscriminationGenerator(TaskGenerator[DiscriminationBatch]):
    """An endless, addressable sequence of images of one split; options as for `TaskGenerator`."""

    def _chunk(self, index: int) -> DiscriminationBatch:
        stream = Stream(self.seed, "discrimination", self.split, index, "scenes")
        n_pairs = CHUNK // 2
        kind = (index * n_pairs + np.arange(n_pairs)) % len(DIFFERENT_KINDS)
        sizes = np.array([len(pairs) for pairs in self._pairs])
        chosen = stream.below(sizes[kind], n_pairs)
        different = np.stack([self._pairs[k][c] for k, c in zip(kind, chosen, strict=True)])
        kept = stream.below(2, n_pairs)
        same = np.repeat(different[np.arange(n_pairs), kept][:, None], 2, axis=1)
        objects = np.stack([different, same], axis=1).reshape(CHUNK, 2, 2)

        corners = self.geometry.corner_pairs()
        corner = np.repeat(corners[stream.below(len(corners), n_pairs)], 2, axis=0)
        shift = stream.below(self.geometry.max_shift + 1, CHUNK, 2, 2)
        scenes = Scenes(shape=objects[..., 0], color=objects[..., 1], corner=corner, shift=shift)
        return DiscriminationBatch(
            pixels=render(
                scenes, self.geometry, Stream(self.seed, "discrimination", self.split, index, "pixels")
            ),
            label=np.tile(np.array([0, 1]), n_pairs),
            different_kind=np.stack([kind + 1, np.zeros_like(kind)], axis=1).reshape(-1),
            shape=scenes.shape,
            color=scenes.color,
            box=self.geometry.boxes(corner),
            tokens=self.geometry.tokens(corner),
            normalization=self.normalization,
        )


def discrimination(
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
    """Make images of the discrimination task as a `datasets.Dataset`; half of them are "same".

    Columns: ``base`` (image), ``label`` (1 same, 0 different), ``different_kind`` ("none", "both", "shape",
    "color"), and for each of the two objects ``shape_k``, ``color_k`` (ids), ``box_k`` (its cell as x0, y0,
    x1, y1, half-open pixels) and ``object_k_tokens`` (patch indices, row-major, prefix tokens not counted).
    The images are those of `DiscriminationGenerator` with the same options. ``progress`` shows a bar if it
    takes longer than two seconds.

    Raises:
        SpecError: an option does not fit; the message says which do.
    """
    check_count(n, "image")
    generator = DiscriminationGenerator(
        split, seed=seed, canvas=canvas, patch=patch, cell=cell, combinations=combinations
    )
    batch = generator.batch(0, n)
    kinds = [KIND_NAMES[kind] for kind in batch.different_kind]
    images = {"base": to_image_column(batch.pixels, progress=progress)}
    return to_dataset(images, batch.metadata(), {"different_kind": kinds})
