"""Clean values that stay in a store and are read batch by batch, so that few are in memory at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import Need, Values
from vit_mechinterp.engine.forwards.clean import Clean, Tick
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.store.clean import StoredClean

__all__ = ["streamed"]


class _StreamedValues(Values):
    """What one read gives, read from the store for the examples that are asked for."""

    def __init__(self, stored: StoredClean, need: Need) -> None:
        super().__init__(torch.empty(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
        self._stored = stored
        self._need = need

    def in_memory(self, examples: IntArray | Sequence[int]) -> Values:
        """Values of some examples: what the store has lost is computed anew, by a forward of its own."""
        chosen = np.unique(np.asarray(examples, dtype=np.int64))
        return self._stored.values(self._need, chosen)

    def whole(self, examples: IntArray | Sequence[int]) -> Tensor:
        """Whole activations of some examples, ``[row, ...]``."""
        return self.in_memory(examples).whole(examples)

    def rows(self, examples: IntArray | Sequence[int], *, tokens: bool = True) -> Tensor:
        """Selected tokens of some examples as ``[m, *features]``, row by row."""
        return self.in_memory(examples).rows(examples, tokens=tokens)


def streamed(stored: StoredClean, schedule: Schedule, tick: Tick) -> Clean:
    """Everything that a schedule needs, computed and kept by the store, to be read from there."""
    stored.fill(schedule, tick)
    needs = schedule.needs.of(range(schedule.n_examples))
    return Clean({need: _StreamedValues(stored, need) for need in needs})
