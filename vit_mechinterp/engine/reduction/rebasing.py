"""Runs of whose base nothing is left: whose rows their own are, or what these start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from vit_mechinterp.engine.binding.bound import BoundCapture, BoundRun, Edit
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read
from vit_mechinterp.spec import Site

__all__ = ["reading_clean_values", "showing_clean_values", "without_base"]

Whose = Callable[[Read, BoundRun], ColumnOrigin | None]


def reading_clean_values(run: BoundRun, others: Mapping[str, BoundRun], whose: Whose) -> BoundRun:
    """A run that reads clean values where runs that it reads hold such.

    ``whose`` gives the image whose clean value a run holds where it is read, if that is one.
    """
    if all(edit.source_run is None for edit in run.edits):
        return run
    edits = []
    for edit in run.edits:
        other = others.get(edit.source_run or "")
        origin = None if edit.source is None or other is None else whose(edit.source, other)
        if edit.source is not None and origin is not None:
            edit = replace(edit, source=replace(edit.source, origin=origin))
        edits.append(edit)
    return replace(run, edits=tuple(edits))


def showing_clean_values(
    run: BoundRun, whose: Whose, edits: Mapping[int, Edit]
) -> tuple[BoundRun, Mapping[int, Edit]]:
    """A run of which nothing but captures is wanted, and those of its edits that count: none where every
    capture is of an image's clean value."""
    captures = []
    for capture in run.captures:
        if not run.is_clean_at(capture.read.site):
            origin = whose(capture.read, run)
            if origin is None:
                return run, edits
            capture = replace(capture, read=replace(capture.read, origin=origin))
        captures.append(capture)
    return replace(run, captures=tuple(captures)), {}


def without_base(
    run: BoundRun, others: Mapping[str, BoundRun], captured: Iterable[Read]
) -> tuple[BoundRun, str | None]:
    """A run whose first edit replaces all that is read of its base, and what it is from there on.

    That is None where rows start from their base even so: something is ``captured`` before the edit, in the
    block that they join at.

    What is captured of it before is its base's still, up to ``clean_before`` where it goes on from a run.
    """
    first, later = run.edits[0], run.edits[1:]
    source = first.source
    # It may be another run's already, and shown as its base's up to a later place than this edit's.
    since = max(filter(None, (run.clean_before, first.site)))
    if source is not None and source.site == first.site and source.positions == first.positions:
        if isinstance(source.origin, ColumnOrigin):
            whose = "image" if source.origin.permutation is None else "another example's image"
            same = _ending_as(run, source.origin, since, edits=later)
            return same, f"{whose} {source.origin.column!r} from {first.site} on"
        other = others.get(first.source_run or "")
        if other is not None and other.edits and other.edits[-1].site <= first.site:
            same = _ending_as(run, other.origin, since, edits=(*other.edits, *later))
            same = replace(same, blank=other.blank, clean_before=since)
            return same, f"run {other.name!r} from {first.site} on"
    if any(run.is_clean_at(read.site) and run.passes_unedited(read.site) for read in captured):
        return run, None
    return replace(run, blank=True), f"what {first.spec.op} puts in at {first.site}"


def _ending_as(run: BoundRun, origin: ColumnOrigin, site: Site, edits: tuple[Edit, ...]) -> BoundRun:
    """A run that is another image's from a site on, but for some edits."""
    captures = tuple(
        BoundCapture(own.name, own.read if own.read.site < site else replace(own.read, origin=origin))
        for own in run.captures
    )
    return replace(run, edits=edits, captures=captures, origin=origin, blank=False)
