"""What rows are compared by: equal keys, equal rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_mechinterp.engine.arrays import BoolArray, IntArray
from vit_mechinterp.engine.binding.alike import alike
from vit_mechinterp.engine.binding.bound import BoundRun, Edit
from vit_mechinterp.engine.binding.joins import output_before
from vit_mechinterp.engine.binding.ops import BUILT_IN, ablate, inject_subspace, interchange, operator_of
from vit_mechinterp.engine.binding.options import options_of
from vit_mechinterp.engine.binding.positions import Positions
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read
from vit_mechinterp.spec import Site

if TYPE_CHECKING:
    from vit_mechinterp.engine.rows.numbering import Part
    from vit_mechinterp.engine.rows.sharing import Sharing

__all__ = ["Key", "RowKeys"]

Key = tuple[Any, ...]


class RowKeys:
    """What rows are compared by: numbers for what varies from example to example, the rest as it is.

    Args:
        sharing: the rows.
        parts: those of every run that are numbered so far, by run; more come in while they are compared.
    """

    def __init__(self, sharing: Sharing, parts: Mapping[str, Sequence[Part]]) -> None:
        self.sharing = sharing
        self.parts = parts
        self._numbers: dict[Key, int] = {}
        self._arrays: dict[tuple[Positions, ...], int | IntArray] = {}
        self._sources: dict[object, IntArray] = {}
        self._distinct: dict[int, tuple[IntArray, bool]] = {}
        self._blank = np.zeros(sharing.n_examples, dtype=np.int64)

    def puts_back(self, run: BoundRun, edit: Edit) -> BoolArray | None:
        """For which examples an edit puts a clean value back where it comes from; None for none at all."""
        source = edit.source
        if operator_of(edit.spec) not in (interchange, inject_subspace, ablate):
            return None
        given = edit.carries or Read(run.origin, edit.site)
        if source is None or source.site != given.site:
            return None
        paired = getattr(edit.spec, "source_tokens", None)
        if self.sharing.imagined and paired not in (None, edit.spec.tokens):
            return None
        here, there = self._selected(edit.positions), self._selected(source.positions)
        if isinstance(here, int) and isinstance(there, int) and here != there:
            return None
        own = self._source(given)
        same: BoolArray = (self._source(source) == own) & (here == there)
        return same if same.any() else None

    def base_of(self, run: BoundRun) -> IntArray:
        """What each example's row of a run starts from: its image, or the same for all."""
        return self._blank if run.blank else self.sharing.images_of(run.origin)

    def with_distinct(self, numbers: IntArray) -> IntArray:
        """The same numbers, known from here on to be distinct."""
        self._distinct[id(numbers)] = numbers, True
        return numbers

    def are_distinct(self, numbers: IntArray) -> bool:
        """Whether no number occurs twice."""
        known = self._distinct.get(id(numbers))
        if known is None:
            known = self._distinct[id(numbers)] = numbers, len(np.unique(numbers)) == len(numbers)
        return known[1]

    def of(self, run: BoundRun, edit: Edit) -> tuple[Key, list[IntArray]]:
        """The key of a run's edit: what its rows share, and numbers ``[example]`` for what may differ."""
        # Other operators may make something of where they are.
        site = self._site(run, edit.site) if operator_of(edit.spec) in BUILT_IN else edit.site
        options = options_of(edit, imagined=self.sharing.imagined)
        fixed: list[Any] = [type(edit.spec), site, edit.spec.heads, options, edit.refs]
        if edit.carries is not None:
            fixed.append(edit.carries.site)
        varying: list[IntArray] = []
        source = edit.positions if edit.source is None else edit.source.positions
        for place in (self._selected(edit.positions, source), self._selected(edit.keys)):
            fixed.append(place if isinstance(place, int) else "each")
            if not isinstance(place, int):
                varying.append(place)
        if edit.source is not None:
            clean = isinstance(edit.source.origin, ColumnOrigin)
            fixed.append(self._site(None, edit.source.site) if clean else edit.source.site)
            varying.append(self._source(edit.source))
        if edit.mean is not None:
            assert isinstance(edit.mean.origin, ColumnOrigin)
            fixed += [self.sharing.first_alike(edit.mean.origin.column), edit.mean.positions]
        if edit.choice is not None:
            varying.append(edit.choices)
            fixed.append("choice")
        return tuple(fixed), varying

    def _site(self, run: BoundRun | None, site: Site) -> Site:
        """One name for a block's input and what the one before puts out, where nobody reads either of them of
        a run, or of one that is alike (that is edited in between, perhaps)."""
        if site.name != "resid_pre" or site.layer not in self.sharing.handed_on:
            return site
        output = output_before(site)
        equals = () if run is None else self._alike.get(run.name, ())
        reads = (read for own in equals for read in self.sharing.bound.reads_of[own.name])
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
        found = -1 - self.sharing.images_of(self._origin_of[name])
        for part in parts:
            made = sum(edit.site <= site for edit in part.run.edits)
            if made:
                found[part.examples] = part.states[made - 1]
        return found

    @cached_property
    def _alike(self) -> Mapping[str, Sequence[BoundRun]]:
        return alike(self.sharing.bound)

    @cached_property
    def _origin_of(self) -> dict[str, ColumnOrigin]:
        return {run.name: run.origin for run in self.sharing.bound.runs}

    def _selected(self, *selections: Positions) -> int | IntArray:
        """A number that stands for selections of tokens that are paired: one for all examples, or, if they
        differ, one for each."""
        if selections not in self._arrays:
            n = next((len(own.each) for own in selections if own.each is not None), 1)
            chosen = (tuple(own.of(example) for own in selections) for example in range(n))
            numbers = np.array([self._numbers.setdefault(each, len(self._numbers)) for each in chosen])
            same = n == 1 or (not self.sharing.imagined and bool((numbers == numbers[0]).all()))
            self._arrays[selections] = int(numbers[0]) if same else numbers
        return self._arrays[selections]
