"""What an experiment needs of a store: which values, of which examples of which image column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vit_mechinterp.engine.positions import IntArray
from vit_mechinterp.engine.schedule import Schedule
from vit_mechinterp.engine.store.forward import Wanted
from vit_mechinterp.engine.values import ColumnOrigin, Read

__all__ = ["Needs", "column_of", "needs_of", "places_of", "stored_form"]

Needs = Mapping[Read | str, IntArray]
"""Reads, and image columns whose output is wanted, with their examples."""


def needs_of(schedule: Schedule, chunk: range, reads: Sequence[Read] | None = None) -> Needs:
    """What one chunk needs, or only some reads, for all of its examples."""
    values, outputs = schedule.clean_needs(chunk, reads)
    needs: dict[Read | str, IntArray] = dict(values.items())
    needs.update(outputs.items())
    return needs


def column_of(need: Read | str) -> str:
    """The image column that a need is about."""
    if isinstance(need, str):
        return need
    assert isinstance(need.origin, ColumnOrigin)
    return need.origin.column


def stored_form(need: Read | str) -> Wanted:
    """What is stored for a need: the column's own values, of tokens that belong to the image."""
    if isinstance(need, str):
        return None
    assert isinstance(need.origin, ColumnOrigin)
    own = ColumnOrigin(need.origin.column)
    if need.origin.permutation is not None and need.positions.each is not None:
        return Read(own, need.site)
    return Read(own, need.site, need.positions, need.heads)


def places_of(schedule: Schedule, need: Read | str, examples: IntArray) -> IntArray:
    """The examples in whose place of the column the images stand."""
    if isinstance(need, str):
        return examples
    assert isinstance(need.origin, ColumnOrigin)
    return schedule.sharing.places_of(need.origin)[examples]
