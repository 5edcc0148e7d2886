"""What several chunks need of clean forwards, which may be computed once, and held."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vit_mechinterp.engine.arrays import NONE, BoolArray, IntArray
from vit_mechinterp.engine.binding.values import Need, Needs, Read, origin_of
from vit_mechinterp.engine.rows.sharing import Sharing

__all__ = ["Common"]


@dataclass(frozen=True)
class Common:
    """Clean values and outputs of images that are in several chunks, for all examples.

    Args:
        sharing: the images' numbers.
        needs: what is needed of them.
        is_common: which images these are, ``[image]``.
        entirely: what no image of a single chunk is needed for.
    """

    sharing: Sharing
    needs: Needs = field(default_factory=dict)
    is_common: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    entirely: frozenset[Need] = frozenset()

    @classmethod
    def of(cls, sharing: Sharing, chunks: Iterable[Needs], mean_reads: Sequence[Read]) -> Common:
        """Find them in what the chunks need, and what is averaged over the dataset, which reads all images.

        Args:
            sharing: the images' numbers.
            chunks: what every chunk needs, in order.
            mean_reads: values to be averaged over the dataset.
        """
        every = list(chunks)
        once = Common(sharing)
        images = [once.images(needs) for needs in every]
        averaged: dict[Need, IntArray] = {read: np.arange(sharing.n_examples) for read in mean_reads}
        images += [once.images(averaged)] * 2  # a mean is read in every chunk
        times = np.bincount(np.concatenate([NONE, *images]))
        found = cls(sharing, {}, times > 1)
        several: dict[Need, list[IntArray]] = {}
        for needs in every:
            for need, examples in needs.items():
                several.setdefault(need, []).append(examples)
        all_needs = {need: np.concatenate(examples) for need, examples in several.items()}
        all_needs.update(averaged)
        common = {need: examples[found._of_common(need, examples)] for need, examples in all_needs.items()}
        entirely = frozenset(need for need, own in common.items() if len(own) == len(all_needs[need]))
        return cls(sharing, {need: own for need, own in common.items() if len(own)}, times > 1, entirely)

    def images(self, needs: Needs) -> IntArray:
        """Numbers of the images that something is needed of, ascending."""
        images = [self.sharing.images_of(origin_of(need))[examples] for need, examples in needs.items()]
        return np.unique(np.concatenate([NONE, *images]))

    def without(self, needs: Needs) -> Needs:
        """What is needed, but of images of a single chunk alone."""
        own = {need: examples[~self._of_common(need, examples)] for need, examples in needs.items()}
        return {need: examples for need, examples in own.items() if len(examples)}

    def _of_common(self, need: Need, examples: IntArray) -> BoolArray:
        images = self.sharing.images_of(origin_of(need))[examples]
        found: BoolArray = self.is_common[images]
        return found
