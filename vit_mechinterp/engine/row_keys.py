"""What rows are compared by: equal keys, equal rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_mechinterp.engine.bound import BoundRun, Edit
from vit_mechinterp.engine.ops import ablate, add_direction, inject_subspace, interchange, operator_of
from vit_mechinterp.engine.positions import BoolArray, IntArray, Positions
from vit_mechinterp.engine.values import ColumnOrigin, Read
from vit_mechinterp.spec import Ablate, Intervention, Site, SourcedIntervention, TensorRef

if TYPE_CHECKING:
    from vit_mechinterp.engine.numbering import Part
    from vit_mechinterp.engine.sharing import Sharing

__all__ = ["Key", "RowKeys"]

Key = tuple[Any, ...]

_BY_HEAD = (interchange, inject_subspace, ablate, add_direction)
"""Operators for which the order of heads means nothing."""
_NUMBERS = (bool, int, float)
_PLAIN = (str, bool, int, float, TensorRef)
"""Types of fields that are compared as they are."""


class RowKeys:
    """What rows are compared by: numbers for what varies from example to example, the rest as it is."""

    def __init__(self, sharing: Sharing, parts: Mapping[str, Sequence[Part]]) -> None:
        self.sharing = sharing
        self.parts = parts
        self._numbers: dict[tuple[int, ...], int] = {}
        self._arrays: dict[tuple[Positions, bool], int | IntArray] = {}
        self._sources: dict[object, IntArray] = {}
        self._distinct: dict[int, tuple[IntArray, bool]] = {}
        self._blank = np.zeros(sharing.n_examples, dtype=np.int64)

    def puts_back(self, run: BoundRun, edit: Edit) -> BoolArray | None:
        """For which examples an edit puts a clean value back where it comes from; None for none at all."""
        source = edit.source
        if operator_of(edit.spec) not in (interchange, inject_subspace, ablate):
            return None
        if source is None or source.site != edit.site:
            return None
        paired = getattr(edit.spec, "source_tokens", None)
        if self.sharing.imagined and paired not in (None, edit.spec.tokens):
            return None
        here, there = self._positions(edit.positions), self._positions(source.positions)
        if isinstance(here, int) and isinstance(there, int) and here != there:
            return None
        own = self._source(Read(run.origin, edit.site))
        same: BoolArray = (self._source(source) == own) & (here == there)
        return same if same.any() else None

    def base_of(self, run: BoundRun) -> IntArray:
        """What each example's row of a run starts from: its image, or the same for all."""
        images = self.sharing.images[run.origin.column]
        return self._blank if run.blank else images

    def are_distinct(self, numbers: IntArray) -> bool:
        """Whether no number occurs twice."""
        known = self._distinct.get(id(numbers))
        if known is None:
            known = self._distinct[id(numbers)] = numbers, len(np.unique(numbers)) == len(numbers)
        return known[1]

    def of(self, run: BoundRun, edit: Edit) -> tuple[Key, list[IntArray]]:
        """The key of a run's edit: what its rows share, and numbers ``[example]`` for what may differ."""
        heads = edit.spec.heads
        if heads is not None and operator_of(edit.spec) in _BY_HEAD:
            heads = tuple(sorted(heads))
        fixed: list[Any] = [type(edit.spec), self._site(run, edit.site), heads, self._options(edit)]
        varying: list[IntArray] = []
        source = edit.source.positions if edit.source else None
        # What is done token by token is the same in any order, if tokens are not paired with others.
        apart = operator_of(edit.spec) in (interchange, ablate) and source in (None, edit.positions)
        for positions in (edit.positions, edit.keys, source):
            place = None if positions is None else self._positions(positions, ordered=not apart)
            fixed.append(place if place is None or isinstance(place, int) else "each")
            if place is not None and not isinstance(place, int):
                varying.append(place)
        if edit.source is not None:
            clean = isinstance(edit.source.origin, ColumnOrigin)
            fixed.append(self._site(None, edit.source.site) if clean else edit.source.site)
            varying.append(self._source(edit.source))
        if edit.mean is not None:
            assert isinstance(edit.mean.origin, ColumnOrigin)
            fixed += [self.sharing.means_of(edit.mean.origin.column), edit.mean.positions]
        if edit.choice is not None:
            varying.append(edit.choices)
            fixed.append("choice")
        return tuple(fixed), varying

    def _site(self, run: BoundRun | None, site: Site) -> Site:
        """One name for a block's input and what the one before puts out, where nobody reads either of them of
        a run (that is edited in between, perhaps)."""
        if site.name != "resid_pre" or site.layer not in self.sharing.handed_on:
            return site
        output = Site(site.layer - 1, "resid_post") if site.layer else Site(None, "embed")
        reads = () if run is None else self.sharing.bound.reads_of[run.name]
        return site if any(read.site in (site, output) for read in reads) else output

    def _source(self, read: Read) -> IntArray:
        """What each example's source value is that of: a clean image's, or that of a row in some state."""
        origin = read.origin
        key = origin if isinstance(origin, ColumnOrigin) else (origin, read.site)
        if key not in self._sources:
            if isinstance(origin, ColumnOrigin):
                self._sources[key] = -1 - self.sharing.images_of(origin)
            else:
                self._sources[key] = self._states_at(origin.run, read.site)
        return self._sources[key]

    def _states_at(self, name: str, site: Site) -> IntArray:
        """The states of a run's rows at a site, or their images' numbers where no edit comes before."""
        parts = self.parts[name]
        found = -1 - self.sharing.images[self._column_of[name]]
        for part in parts:
            made = sum(edit.site <= site for edit in part.run.edits)
            if made:
                found[part.examples] = part.states[made - 1]
        return found

    @cached_property
    def _column_of(self) -> dict[str, str]:
        return {run.name: run.origin.column for run in self.sharing.bound.runs}

    def _positions(self, positions: Positions, *, ordered: bool = True) -> int | IntArray:
        """A number that stands for the positions: one for all examples, or one for each, if they differ."""
        as_number = self._number if ordered else lambda chosen: self._number(tuple(sorted(chosen)))
        if positions.each is None:
            return -1 if positions.shared is None else as_number(positions.shared)
        if (positions, ordered) not in self._arrays:
            own = np.array([as_number(chosen) for chosen in positions.each], dtype=np.int64)
            same = not self.sharing.imagined and bool((own == own[0]).all())
            self._arrays[positions, ordered] = int(own[0]) if same else own
        return self._arrays[positions, ordered]

    def _number(self, chosen: tuple[int, ...]) -> int:
        return self._numbers.setdefault(chosen, len(self._numbers))

    def _options(self, edit: Edit) -> object:
        """Every field of an intervention that is not resolved into the bound edit."""
        resolved = _resolved(
            type(edit.spec), self.sharing.imagined, edit.choice is not None, edit.source is not None
        )
        spec = edit.spec
        values = [getattr(spec, name) for name in _fields(type(spec)) if name not in resolved]
        if all(value is None or type(value) in _PLAIN for value in values):
            # Told apart by type and by how they are written, as in a document: 1.0 is not "1.0", nor 1 True.
            return tuple((type(value), repr(value)) if type(value) in _NUMBERS else value for value in values)
        return spec.model_dump_json(exclude=set(resolved))


@cache
def _resolved(kind: type[Intervention], imagined: bool, chosen: bool, sourced: bool) -> frozenset[str]:
    """Fields whose meaning the bound edit holds."""
    resolved = set() if imagined else {"site", "tokens", "heads", "keys"}
    if issubclass(kind, SourcedIntervention) and not imagined:
        resolved |= {"source", "source_tokens", "source_site"}
    if chosen and not imagined:
        resolved.add("choose")
    if issubclass(kind, Ablate) and sourced:
        resolved.add("seed")
    return frozenset(resolved)


@cache
def _fields(kind: type[Intervention]) -> tuple[str, ...]:
    return tuple(kind.model_fields)
