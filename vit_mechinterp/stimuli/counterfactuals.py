"""Pairs of images for interchange interventions on one attribute of one object (Lepori et al. 2024,
distributed alignment search).

Each item has a base image and a source image. Putting the analysed attribute of the source object into the
edited object of the base turns a "different" image into a "same" one, or a "same" one into a "different" one:

* different to same: the base's objects differ in the analysed attribute alone. The source object has the
  attribute of the base's *other* object, and another value of the second attribute than the base. The second
  object of the source image differs from the source object in both.
* same to different: the base shows one object twice, and so does the source image, with another one that
  differs from it in both attributes.

The edited object is object 1 of the base. Base objects obey the split's combinations; the source image may
show any of the 256 objects. The objects of the source image stand at places of their own. The wrong-object
control takes ``source_other_tokens`` in place of ``source_tokens``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.stimuli.chunks import CHUNK, ChunkedGenerator
from vit_mechinterp.stimuli.columns import check_count, object_columns, to_dataset
from vit_mechinterp.stimuli.geometry import Geometry
from vit_mechinterp.stimuli.render import (
    NORMALIZATION,
    Normalization,
    Scenes,
    render,
    to_image_column,
    to_tensor,
)
from vit_mechinterp.stimuli.splits import Split, allowed_combinations, check_split, object_pairs
from vit_mechinterp.stimuli.streams import Stream

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "ATTRIBUTES",
    "Attribute",
    "CounterfactualBatch",
    "CounterfactualGenerator",
    "check_attribute",
    "counterfactuals",
]

Attribute = Literal["shape", "color"]
Direction = Literal["both", "different_to_same", "same_to_different"]
ATTRIBUTES: tuple[Attribute, ...] = ("shape", "color")
_DIRECTIONS: tuple[Direction, ...] = ("both", "different_to_same", "same_to_different")
_VALUES = 16


@dataclass(frozen=True)
class CounterfactualBatch:
    """Base and source images with all that is known about them; along the object axis, the edited (source)
    object comes first.

    Attributes:
        base_pixels, source_pixels: uint8 ``[n, 3, canvas, canvas]``.
        label, counterfactual_label: 1 same, 0 different, before and after the intervention ``[n]``.
        base_objects, source_objects: (shape id, colour id) of the two objects ``[n, 2, 2]``.
        base_box, source_box: their cells as (x0, y0, x1, y1), half-open pixels ``[n, 2, 4]``.
        base_tokens, source_tokens: their patch indices ``[n, 2, tokens_per_object]``.
    """

    base_pixels: UInt8[np.ndarray, "item channel height width"]
    source_pixels: UInt8[np.ndarray, "item channel height width"]
    label: NDArray[np.int64]
    counterfactual_label: NDArray[np.int64]
    base_objects: NDArray[np.int64]
    source_objects: NDArray[np.int64]
    base_box: NDArray[np.int64]
    source_box: NDArray[np.int64]
    base_tokens: NDArray[np.int64]
    source_tokens: NDArray[np.int64]
    normalization: Normalization = NORMALIZATION

    def metadata(self) -> dict[str, NDArray[np.int64]]:
        """Return every column but the images, by the names of the dataset."""
        columns = {"label": self.label, "counterfactual_label": self.counterfactual_label}
        for index, (base, source) in enumerate((("edited", "source"), ("other", "source_other"))):
            columns[f"{base}_box"] = self.base_box[:, index]
            columns[f"{source}_box"] = self.source_box[:, index]
            columns[f"{base}_tokens"] = self.base_tokens[:, index]
            columns[f"{source}_tokens"] = self.source_tokens[:, index]
            columns[f"{source}_shape"] = self.source_objects[:, index, 0]
            columns[f"{source}_color"] = self.source_objects[:, index, 1]
        shape, color = self.base_objects[..., 0], self.base_objects[..., 1]
        return columns | object_columns(shape, color, self.base_box, self.base_tokens)

    def columns(self) -> dict[str, Tensor]:
        """Return all columns as tensors, the images normalised to float32 ``[n, 3, canvas, canvas]``."""
        images = {
            "base": to_tensor(self.base_pixels, self.normalization),
            "source": to_tensor(self.source_pixels, self.normalization),
        }
        return images | {
            name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in self.metadata().items()
        }


class CounterfactualGenerator(ChunkedGenerator[CounterfactualBatch]):
    """An endless, addressable sequence of counterfactual pairs.

    Args:
        attribute: "shape" or "color", the attribute that the intervention exchanges.
        direction: "different_to_same", "same_to_different", or "both" (even items the first, odd items the
            second).
        split, seed, canvas, patch, cell, combinations, normalization: as for `DiscriminationGenerator`.

    Raises:
        SpecError: an option does not fit; the message says which do.
    """

    def __init__(
        self,
        attribute: str,
        *,
        direction: str = "both",
        split: str = "train",
        seed: int = 0,
        canvas: int = 224,
        patch: int = 16,
        cell: int = 32,
        combinations: str = "256-256-256",
        normalization: Normalization = NORMALIZATION,
    ) -> None:
        super().__init__()
        self.attribute: Attribute = check_attribute(attribute)
        self.direction: Direction = _one_of("direction", direction, _DIRECTIONS)
        self.split: Split = check_split(split)
        self.seed = seed
        self.geometry = Geometry(canvas, patch, cell)
        self.normalization = normalization
        self._different = object_pairs(self.attribute, self.split, combinations)
        self._objects = np.argwhere(allowed_combinations(self.split, combinations))

    def _chunk(self, index: int) -> CounterfactualBatch:
        path = ("counterfactuals", self.attribute, self.direction, self.split, index)
        stream = Stream(self.seed, *path, "scenes")
        to_same = {"both": np.arange(CHUNK) % 2 == 0}.get(
            self.direction, np.full(CHUNK, self.direction == "different_to_same")
        )
        base, source = self._objects_of(to_same, stream)
        corners = self.geometry.corner_pairs()
        pixels, boxes, tokens = [], [], []
        for name, objects in (("base", base), ("source", source)):
            corner = corners[stream.below(len(corners), CHUNK)]
            shift = stream.below(self.geometry.max_shift + 1, CHUNK, 2, 2)
            scenes = Scenes(shape=objects[..., 0], color=objects[..., 1], corner=corner, shift=shift)
            pixels.append(render(scenes, self.geometry, Stream(self.seed, *path, name)))
            boxes.append(self.geometry.boxes(corner))
            tokens.append(self.geometry.tokens(corner))
        label = np.where(to_same, 0, 1)
        return CounterfactualBatch(
            base_pixels=pixels[0],
            source_pixels=pixels[1],
            label=label,
            counterfactual_label=1 - label,
            base_objects=base,
            source_objects=source,
            base_box=boxes[0],
            source_box=boxes[1],
            base_tokens=tokens[0],
            source_tokens=tokens[1],
            normalization=self.normalization,
        )

    def _objects_of(
        self, to_same: NDArray[np.bool_], stream: Stream
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Choose the objects of base and source images: two arrays ``[n, 2, 2]`` of (shape id, colour id)."""
        n = len(to_same)
        analysed, second = (0, 1) if self.attribute == "shape" else (1, 0)
        different = self._different[stream.below(len(self._different), n)]
        same = np.repeat(self._objects[stream.below(len(self._objects), n)][:, None], 2, axis=1)
        base = np.where(to_same[:, None, None], different, same)

        source = np.empty_like(base)
        wanted = np.where(to_same, base[:, 1, analysed], stream.excluding(_VALUES, base[:, 0, analysed]))
        source[:, 0, analysed] = wanted
        source[:, 1, analysed] = np.where(to_same, stream.excluding(_VALUES, wanted), wanted)
        source[:, 0, second] = stream.excluding(_VALUES, base[:, 0, second])
        third = stream.excluding(_VALUES, base[:, 0, second], source[:, 0, second])
        source[:, 1, second] = np.where(to_same, third, source[:, 0, second])
        return base, source


def check_attribute(attribute: str) -> Attribute:
    """Return ``attribute`` if objects have it.

    Raises:
        SpecError: they do not; the message lists what they have.
    """
    checked: Attribute = _one_of("attribute", attribute, ATTRIBUTES)
    return checked


def _one_of(option: str, value: str, options: tuple[Any, ...]) -> Any:
    if value not in options:
        raise SpecError(
            f"{option}={value!r} is not known. Choose one of: {', '.join(options)}.{suggest(value, options)}"
        )
    return value


def counterfactuals(
    attribute: str,
    n: int = 2000,
    *,
    direction: str = "both",
    split: str = "train",
    seed: int = 0,
    canvas: int = 224,
    patch: int = 16,
    cell: int = 32,
    combinations: str = "256-256-256",
    progress: bool = True,
) -> Dataset:
    """Make counterfactual pairs for ``attribute`` ("shape" or "color") as a `datasets.Dataset`; with an even
    ``n``, both directions are equally frequent.

    Columns: ``base``, ``source`` (images), ``label`` and ``counterfactual_label`` (1 same, 0 different), and
    the places of four objects: ``edited`` and ``other`` in the base, ``source`` and ``source_other`` in the
    source image, each as ``*_box`` (x0, y0, x1, y1, half-open pixels) and as ``*_tokens`` (patch indices,
    row-major, prefix tokens not counted). The base's objects are also given as ``shape_k``, ``color_k``,
    ``box_k``, ``object_k_tokens`` (1 is the edited one), the source image's as ``source_shape``,
    ``source_color``, ``source_other_shape``, ``source_other_color``. ``progress`` shows a bar if it takes
    longer than two seconds.

    Raises:
        SpecError: an option does not fit; the message says which do.
    """
    check_count(n, "pair")
    generator = CounterfactualGenerator(
        attribute,
        direction=direction,
        split=split,
        seed=seed,
        canvas=canvas,
        patch=patch,
        cell=cell,
        combinations=combinations,
    )
    batch = generator.batch(0, n)
    images = to_image_column(np.concatenate([batch.base_pixels, batch.source_pixels]), progress=progress)
    return to_dataset({"base": images[:n], "source": images[n:]}, batch.metadata())
