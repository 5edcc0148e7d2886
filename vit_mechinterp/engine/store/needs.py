"""What an experiment needs of a store: which values, of which examples of which image column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vit_mechinterp.engine.positions import IntArray
from vit_mechinterp.engine.schedule import Schedule
from vit_mechinterp.engine.store.forward import Wanted
from vit_mechinterp.engine.values import ColumnOrigin, Read

__all__ = ["Need", "Needs", "needs_of", "origin_of", "places_of", "stored_form"]

Need = Read | ColumnOrigin
"""A clean value, or the output of images."""
Needs = Mapping[Need, IntArray]
"""What is needed, each of some examples."""


def needs_of(schedule: Schedule, chunk: range, reads: Sequence[Read] | None = None) -> Needs:
    """What one chunk needs, or only some reads, for all of its examples."""
    values, outputs = schedule.clean_needs(chunk, reads)
    needs: dict[Need, IntArray] = dict(values.items())
    needs.update(outputs.items())
    return needs


def origin_of(schedule: Schedule, need: Need) -> ColumnOrigin:
    """The images that a need is about; those of columns that hold the same are the first one's."""
    origin = need if isinstance(need, ColumnOrigin) else need.origin
    assert isinstance(origin, ColumnOrigin)
    return ColumnOrigin(schedule.sharing.first_alike(origin.column), origin.permutation)


def stored_form(schedule: Schedule, need: Need) -> Wanted:
    """What is stored for a need: the column's own values, of tokens that belong to the image."""
    if isinstance(need, ColumnOrigin):
        return None
    origin = origin_of(schedule, need)
    own = ColumnOrigin(origin.column)
    if origin.permutation is not None and need.positions.each is not None:
        return Read(own, need.site)
    return Read(own, need.site, need.positions, need.heads)


def places_of(schedule: Schedule, need: Need, examples: IntArray) -> IntArray:
    """The examples in whose place of the column the images stand."""
    return schedule.sharing.places_of(origin_of(schedule, need))[examples]
