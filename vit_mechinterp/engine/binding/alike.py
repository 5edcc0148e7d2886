"""Runs that make the same rows: bound edits are compared by what they do, in whatever words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vit_mechinterp.engine.binding.bound import Bound, BoundRun, Edit
from vit_mechinterp.engine.binding.options import options_of
from vit_mechinterp.engine.binding.values import ColumnOrigin

__all__ = ["Kind", "alike", "doing", "kind_of", "tokens_of"]

Kind = tuple[object, ...]


def alike(bound: Bound) -> Mapping[str, Sequence[BoundRun]]:
    """By run, all whose edits do the same to the same images, itself included; empty where nothing but
    outputs is wanted."""
    if len(bound.with_output) == len(bound.runs) and not any(bound.reads_of.values()):
        return {}
    found: dict[Kind, list[BoundRun]] = {}
    for run in bound.runs:
        does = (run.origin, run.blank, *(doing(edit, run.origin) for edit in run.edits))
        found.setdefault(does, []).append(run)
    return {run.name: own for own in found.values() for run in own}


def doing(edit: Edit, base: ColumnOrigin) -> Kind:
    """What an edit does, and where: equal for edits of two runs, and for those declared in other words."""
    chosen = (*tokens_of(edit), edit.spec.heads, edit.keys, edit.idle)
    return (edit.site, edit.carries, *kind_of(edit, base), *chosen)


def kind_of(edit: Edit, base: ColumnOrigin) -> Kind:
    """What an edit does, whichever tokens and heads it does it to."""
    source, mean = edit.source, edit.mean
    # What puts its base's own tokens back is left out by itself.
    back = source is not None and source.origin == base and source.positions == edit.positions
    return (
        type(edit.spec),
        options_of(edit, imagined=False),
        edit.refs,
        edit.choice,
        source and (source.origin, source.site, back),
        mean and (mean.origin, mean.positions),
    )


def tokens_of(edit: Edit) -> Kind:
    """The tokens that an edit is made at, and those that it reads."""
    return edit.positions, None if edit.source is None else edit.source.positions
