"""What an experiment needs of a store: which values, of which examples of which image column."""

from __future__ import annotations

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import ColumnOrigin, Need, Read, origin_of
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.store.forward import Wanted

__all__ = ["places_of", "stored_form", "stored_origin"]


def stored_origin(schedule: Schedule, need: Need) -> ColumnOrigin:
    """The images that a need is about; those of columns that hold the same are the first one's."""
    origin = origin_of(need)
    return ColumnOrigin(schedule.sharing.first_alike(origin.column), origin.permutation)


def stored_form(schedule: Schedule, need: Need) -> Wanted:
    """What is stored for a need: the column's own values, of tokens that belong to the image."""
    if isinstance(need, ColumnOrigin):
        return None
    origin = stored_origin(schedule, need)
    own = ColumnOrigin(origin.column)
    if origin.permutation is not None and need.positions.each is not None:
        return Read(own, need.site)
    return Read(own, need.site, need.positions, need.heads)


def places_of(schedule: Schedule, need: Need, examples: IntArray) -> IntArray:
    """The examples in whose place of the column the images stand."""
    return schedule.sharing.places_of(stored_origin(schedule, need))[examples]
