"""Clean values that several chunks need, held from the first that asks for them on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from vit_mechinterp.engine.arrays import BoolArray, IntArray
from vit_mechinterp.engine.binding.values import Need, Read, Values
from vit_mechinterp.engine.forwards.clean import Clean, PlainClean, Tick, means_from
from vit_mechinterp.engine.forwards.clean_forwards import Filling, forwards
from vit_mechinterp.engine.inputs.ahead import Request
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling.clean_groups import CleanGroup
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["HeldClean"]


class HeldClean(PlainClean):
    """Computes what several chunks need once, and holds it; what one chunk alone needs is computed for it.

    An image that several chunks need passes through the model when the first of them asks for it. The
    schedule says which do so together, so that each gives the same bits whichever chunk that is.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._filling = {
            need: Filling.of(schedule, need, examples)
            for need, examples in schedule.needs.common.needs.items()
        }
        self._is_there: BoolArray = np.zeros(len(schedule.needs.common.is_common), dtype=np.bool_)

    def __call__(
        self,
        vit: HookedViT,
        data: Data,
        schedule: Schedule,
        chunk: range,
        reads: Sequence[Read] | None = None,
        tick: Tick = lambda n: None,
    ) -> Clean:
        """What one chunk needs."""
        for batch in forwards(vit, data, self._missing(schedule, chunk, self._is_there), self._filling, tick):
            self._is_there[batch.images] = True
        own = super().__call__(vit, data, schedule, chunk, reads, tick).values
        needs = schedule.needs.of(chunk).items()
        return Clean({need: self._with_held(need, examples, own.pop(need, None)) for need, examples in needs})

    def means(
        self, vit: HookedViT, data: Data, schedule: Schedule, tick: Tick = lambda n: None
    ) -> dict[Read, Tensor]:
        """Dataset means; what the same forwards give to chunks is there from then on."""
        for batch in forwards(vit, data, schedule.common_batches, self._filling, tick):
            self._is_there[batch.images] = True
        means = means_from(
            schedule, Clean({read: self._filling[read].values() for read in schedule.reads.means})
        )
        for read in filter(schedule.reads.is_for_means_alone, schedule.reads.means):
            del self._filling[read]  # no forward is left, which would be another one without it
        return means

    def requests(
        self, schedule: Schedule, chunks: Iterable[range], reads: Sequence[Read] | None = None
    ) -> Iterator[Request]:
        """The batches of images that will be asked for, in order; with ``reads``, by means."""
        if reads is not None:
            for batch in schedule.common_batches:
                yield from batch.by_column()
            return
        is_there = self._is_there.copy()
        for chunk in chunks:
            for batch in self._missing(schedule, chunk, is_there):
                is_there[batch.images] = True
                yield from batch.by_column()
            yield from super().requests(schedule, [chunk])

    def _missing(self, schedule: Schedule, chunk: range, is_there: BoolArray) -> list[CleanGroup]:
        """The forwards that give what a chunk needs and is not there."""
        images = schedule.needs.common.images(schedule.needs.of(chunk))
        wanted = images[schedule.needs.common.is_common[images] & ~is_there[images]]
        numbers = np.unique(schedule.common_batch_of[wanted])
        return [schedule.common_batches[number] for number in numbers.tolist()]

    def _with_held(self, need: Need, examples: IntArray, own: Values | None) -> Values:
        """What is needed of some examples, of which the chunk's own forwards have given some."""
        missing = examples if own is None else np.setdiff1d(examples, own.examples)
        if own is not None and not len(missing):
            return own
        held = self._filling[need].values()
        if own is None:
            return held
        parts = ((own, own.examples), (held, missing))
        return Values.joined(need, [(some, values.selected(need, some)) for values, some in parts])
