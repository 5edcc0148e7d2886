"""Pairs of images for interchange interventions on one attribute of one object of relational match to sample
(Lepori et al. 2024, distributed alignment search).

One object of one pair of the base, the edited object, is to take over the analysed attribute of the object in
the same place of the *other* pair of the source image. The source image shows the base's objects at the
base's places, but for that one attribute of that one object (textures and positions inside the cells are
drawn anew). The edit turns the relation of the edited pair round, and with it the label:

* the edited pair is "same": the source object has another value of the attribute than the edited one;
* the edited pair is "different", in the analysed attribute alone: the source object has the value of the
  edited object's partner.

Items cycle through the eight combinations of edited pair (sample, display), its relation, and the label. Base
objects obey the split's combinations; the source object may be any of the 256. The wrong-object control takes
``source_other_tokens`` in place of ``source_tokens``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from vit_mechinterp.stimuli.chunks import CHUNK, ChunkedGenerator
from vit_mechinterp.stimuli.columns import check_count, to_dataset
from vit_mechinterp.stimuli.counterfactuals import ATTRIBUTES, Attribute, check_attribute
from vit_mechinterp.stimuli.geometry import Geometry
from vit_mechinterp.stimuli.render import Scenes, render, to_image_column
from vit_mechinterp.stimuli.rmts import display_corners, pair_columns, sample_corners
from vit_mechinterp.stimuli.splits import (
    DIFFERENT_KINDS,
    Split,
    allowed_combinations,
    check_split,
    object_pairs,
)
from vit_mechinterp.stimuli.streams import Stream

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["RMTSCounterfactualBatch", "RMTSCounterfactualGenerator", "rmts_counterfactuals"]

PAIRS: tuple[str, str] = ("sample", "display")
_VALUES = 16
_CANDIDATES = 64
"""Draws for the pair that is not edited, of which the first that fits is taken."""


@dataclass(frozen=True)
class RMTSCounterfactualBatch:
    """Base and source images with all that is known about them. Objects stand in the order sample 1, sample
    2, display 1, display 2; both images of an item have the same boxes and tokens.

    Attributes:
        base_pixels, source_pixels: uint8 ``[n, 3, canvas, canvas]``.
        label: 1 if both pairs show the same relation, before the intervention ``[n]``.
        relation: 1 same, 0 different, of the edited pair before the intervention ``[n]``.
        edited: the position of the edited object ``[n]``.
        source: the position of the source object ``[n]``.
        base_objects, source_objects: (shape id, colour id) of the four objects ``[n, 4, 2]``.
        box: their cells as (x0, y0, x1, y1), half-open pixels ``[n, 4, 4]``.
        tokens: their patch indices ``[n, 4, tokens_per_object]``.
    """

    base_pixels: UInt8[np.ndarray, "item channel height width"]
    source_pixels: UInt8[np.ndarray, "item channel height width"]
    label: NDArray[np.int64]
    relation: NDArray[np.int64]
    edited: NDArray[np.int64]
    source: NDArray[np.int64]
    base_objects: NDArray[np.int64]
    source_objects: NDArray[np.int64]
    box: NDArray[np.int64]
    tokens: NDArray[np.int64]

    def metadata(self) -> dict[str, NDArray[np.int64]]:
        """Return every column of numbers, by the names of the dataset."""
        rows = np.arange(len(self.label))
        columns = {
            "label": self.label,
            "counterfactual_label": 1 - self.label,
            "intermediate_judgement": self.relation,
        }
        # Positions 2p and 2p + 1 are the two objects of one pair.
        places = {
            "edited": self.edited,
            "other": self.edited ^ 1,
            "source": self.source,
            "source_other": self.source ^ 1,
        }
        for name, place in places.items():
            columns[f"{name}_box"] = self.box[rows, place]
            columns[f"{name}_tokens"] = self.tokens[rows, place]
            objects = self.source_objects if name.startswith("source") else self.base_objects
            columns[f"{name}_shape"] = objects[rows, place, 0]
            columns[f"{name}_color"] = objects[rows, place, 1]
        shape, color = self.base_objects[..., 0], self.base_objects[..., 1]
        return columns | pair_columns(shape, color, self.box, self.tokens)

    def edited_pairs(self) -> list[str]:
        """Return which pair is edited, "sample" or "display", item by item."""
        return [PAIRS[place // 2] for place in self.edited]


class RMTSCounterfactualGenerator(ChunkedGenerator[RMTSCounterfactualBatch]):
    """An endless, addressable sequence of counterfactual pairs.

    Args:
        attribute: "shape" or "color", the attribute that the intervention exchanges.
        split, seed, canvas, patch, cell, combinations: as for `DiscriminationGenerator`.

    Raises:
        SpecError: an option does not fit; the message says which do.
    """

    def __init__(
        self,
        attribute: str,
        *,
        split: str = "train",
        seed: int = 0,
        canvas: int = 224,
        patch: int = 16,
        cell: int = 32,
        combinations: str = "256-256-256",
    ) -> None:
        super().__init__()
        self.attribute: Attribute = check_attribute(attribute)
        self.split: Split = check_split(split)
        self.seed = seed
        self.geometry = Geometry(canvas, patch, cell)
        self._objects = np.argwhere(allowed_combinations(self.split, combinations))
        self._different = object_pairs(self.attribute, self.split, combinations)
        self._any_kind = np.concatenate([object_pairs(k, self.split, combinations) for k in DIFFERENT_KINDS])
        self._corners = sample_corners(self.geometry)

    def _chunk(self, index: int) -> RMTSCounterfactualBatch:
        path = ("rmts counterfactuals", self.attribute, self.split, index)
        stream = Stream(self.seed, *path, "scenes")
        cell = np.arange(CHUNK) % 8
        pair, relation, label = cell // 4, cell // 2 % 2, cell % 2
        place = stream.below(2, CHUNK)
        edited, source = 2 * pair + place, 2 * (1 - pair) + place
        base = self._base_objects(stream, edited, relation, label)
        changed = self._source_objects(stream, base, edited, source, relation)

        sample = self._corners[stream.below(len(self._corners), CHUNK)]
        corner = np.concatenate(
            [sample, np.broadcast_to(display_corners(self.geometry), sample.shape)], axis=1
        )
        pixels = {}
        for name, objects in (("base", base), ("source", changed)):
            shift = stream.below(self.geometry.max_shift + 1, CHUNK, 4, 2)
            scenes = Scenes(shape=objects[..., 0], color=objects[..., 1], corner=corner, shift=shift)
            pixels[name] = render(scenes, self.geometry, Stream(self.seed, *path, name))
        return RMTSCounterfactualBatch(
            base_pixels=pixels["base"],
            source_pixels=pixels["source"],
            label=label,
            relation=relation,
            edited=edited,
            source=source,
            base_objects=base,
            source_objects=changed,
            box=self.geometry.boxes(corner),
            tokens=self.geometry.tokens(corner),
        )

    def _base_objects(
        self,
        stream: Stream,
        edited: NDArray[np.int64],
        relation: NDArray[np.int64],
        label: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Choose the base's objects: ``[n, 4, 2]`` of (shape id, colour id)."""
        n, rows = len(edited), np.arange(len(edited))
        analysed = ATTRIBUTES.index(self.attribute)
        mine = self._pair(stream, relation, self._different)
        partner = mine[rows, 1 - edited % 2]
        # The relation of the other pair follows from the label.
        other_relation = np.where(label == 1, relation, 1 - relation)
        theirs = mine
        open_ = np.ones(n, dtype=bool)
        for _ in range(_CANDIDATES):
            drawn = self._pair(stream, other_relation, self._any_kind)
            taken = drawn[rows, edited % 2, analysed]
            # The edit of the source image is to change something, and two pairs never show the same objects.
            fits = (taken != partner[:, analysed]) & ~_same_objects(drawn, mine)
            theirs = np.where((open_ & fits)[:, None, None], drawn, theirs)
            open_ &= ~fits
        assert not open_.any()
        sample_edited = (edited < 2)[:, None, None]
        return np.concatenate(
            [np.where(sample_edited, mine, theirs), np.where(sample_edited, theirs, mine)], axis=1
        )

    def _pair(
        self, stream: Stream, relation: NDArray[np.int64], different: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Draw a pair of objects of each relation: ``[n, 2, 2]``."""
        n = len(relation)
        one = self._objects[stream.below(len(self._objects), n)]
        two = different[stream.below(len(different), n)]
        return np.where((relation == 1)[:, None, None], np.repeat(one[:, None], 2, axis=1), two)

    def _source_objects(
        self,
        stream: Stream,
        base: NDArray[np.int64],
        edited: NDArray[np.int64],
        source: NDArray[np.int64],
        relation: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Change the analysed attribute of the source object: ``[n, 4, 2]``."""
        rows, analysed = np.arange(len(edited)), ATTRIBUTES.index(self.attribute)
        partner = base[rows, edited ^ 1, analysed]
        # The two are distinct: in a "same" pair the partner has the edited object's own value.
        another = stream.excluding(_VALUES, partner, base[rows, source, analysed])
        changed = base.copy()
        changed[rows, source, analysed] = np.where(relation == 1, another, partner)
        return changed


def _same_objects(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pairs ``[n, 2, 2]`` show the same two objects, in either order."""
    straight = (one == other).all(axis=(1, 2))
    crossed = (one == other[:, ::-1]).all(axis=(1, 2))
    return np.asarray(straight | crossed)


def rmts_counterfactuals(
    attribute: str,
    n: int = 2000,
    *,
    split: str = "train",
    seed: int = 0,
    canvas: int = 224,
    patch: int = 16,
    cell: int = 32,
    combinations: str = "256-256-256",
    progress: bool = True,
) -> Dataset:
    """Make counterfactual pairs for ``attribute`` ("shape" or "color") as a `datasets.Dataset`; with an ``n``
    that eight divides, label, relation and edited pair are balanced.

    Columns: ``base``, ``source`` (images), ``label`` and ``counterfactual_label`` (1: both pairs show the
    same relation), ``intermediate_judgement`` (the edited pair's relation before the intervention, 1 same),
    ``edited_pair`` ("sample" or "display"), and of four objects, ``edited`` and its partner ``other`` in the
    base, ``source`` and its partner ``source_other`` in the source image, ``*_box`` (x0, y0, x1, y1,
    half-open pixels), ``*_tokens`` (patch indices, row-major, prefix tokens not counted), ``*_shape`` and
    ``*_color``. The base's objects are also given as in `rmts`. ``progress`` shows a bar if it takes longer
    than two seconds.

    Raises:
        SpecError: an option does not fit; the message says which do.
    """
    check_count(n, "pair")
    options: dict[str, Any] = {"canvas": canvas, "patch": patch, "cell": cell, "combinations": combinations}
    batch = RMTSCounterfactualGenerator(attribute, split=split, seed=seed, **options).batch(0, n)
    images = to_image_column(np.concatenate([batch.base_pixels, batch.source_pixels]), progress=progress)
    return to_dataset(
        {"base": images[:n], "source": images[n:]}, batch.metadata(), {"edited_pair": batch.edited_pairs()}
    )
