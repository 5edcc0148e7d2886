"""Where a column's images stand in a store: equal images once, in the order in which they first appear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vit_mechinterp.engine.arrays import IntArray

__all__ = ["Slots", "slots_of"]


@dataclass(frozen=True)
class Slots:
    """Slots for the values of a column: the slots of one image behind one another, image by image.

    Args:
        of: the slot of every example, ``[example]``.
        examples: an example of every slot, ``[slot]``.
        begins: where the slots of every distinct image begin, ``[image + 1]``.
    """

    of: IntArray
    examples: IntArray
    begins: IntArray

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def n_images(self) -> int:
        """Number of distinct images."""
        return len(self.begins) - 1

    def of_images(self, images: range) -> range:
        """The slots of consecutive distinct images."""
        return range(int(self.begins[images.start]), int(self.begins[images.stop]))


def slots_of(numbers: IntArray) -> tuple[Slots, Slots]:
    """Slots by image and by example; one and the same, in the column's order, where no image is repeated.

    What is the same for all examples of one image needs a slot for each image. Tokens that are chosen example
    by example need one for each example.

    Args:
        numbers: numbers of a column's images, ``[example]``; equal numbers, equal images.
    """
    _, first, which = np.unique(numbers, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    image = rank[which.reshape(-1)]
    by_image = Slots(image, first[order], np.arange(len(order) + 1))
    if len(order) == len(numbers):
        return by_image, by_image
    examples = np.argsort(image, kind="stable")
    of = np.empty_like(examples)
    of[examples] = np.arange(len(examples))
    begins = np.concatenate([[0], np.cumsum(np.bincount(image))])
    return by_image, Slots(of, examples, begins)
