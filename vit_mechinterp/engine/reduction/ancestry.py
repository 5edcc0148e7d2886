"""Whose value every token of a run holds: its edits are walked through from the first to the last.

Numbers stand for whom values are of: images whose clean values are put in, the run's own base, or another run
that begins as it does. What is made of one's values alone is that one's (see `Anatomy`). An edit that puts in
what is there already changes nothing at those tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.engine.binding.bound import BoundRun, Edit
from vit_mechinterp.engine.binding.ops import BUILT_IN, inject_subspace, operator_of
from vit_mechinterp.engine.binding.values import ColumnOrigin, RunOrigin
from vit_mechinterp.engine.reduction.anatomy import OF_ALL_TOKENS, Anatomy, sites_of
from vit_mechinterp.engine.reduction.masks import Mask, Masks
from vit_mechinterp.spec import Site

__all__ = ["Ancestry", "brings", "may_hold"]

Whose = NDArray[np.int16]
"""``[example or 1, token or 1, head or 1]``."""
_NOBODY = -1


def brings(edit: Edit, *, imagined: bool) -> bool:
    """Whether an edit brings tokens of an image, or of another run, to where they come from."""
    source, spec = edit.source, edit.spec
    # Without data the same stands for what all columns select.
    if source is None or (imagined and getattr(spec, "source_tokens", None) not in (None, spec.tokens)):
        return False
    is_inject = operator_of(spec) is inject_subspace
    return (source.site, source.positions) == (edit.site, edit.positions) and (edit.puts_in or is_inject)


def may_hold(edit: Edit, site: Site) -> bool:
    """Whether tokens may be untouched at a site by an edit before it: no attention call of all tokens lies
    between the two."""
    before, layer = edit.site.layer, site.layer
    if edit.site.name == "embed":
        return layer == 0 or site.name == "embed"
    if layer is None or before is None:
        return False
    return layer == before or (layer == before + 1 and edit.site.name not in OF_ALL_TOKENS)


class Ancestry:
    """One walk through a run.

    Attributes:
        changes: where edits change something, by their place, for those that do not wherever they are made.
        at: whose the values at some sites are, after their edits.

    Args:
        anatomy: the model's.
        masks: of the run's edits.
        run: the run.
        wanted: sites to say more of.
        reference: another run of the same base, to be number 0 instead of the base.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        masks: Masks,
        run: BoundRun,
        wanted: Iterable[Site] = (),
        reference: BoundRun | None = None,
    ) -> None:
        self.anatomy, self.masks, self.run = anatomy, masks, run
        self.changes: dict[int, Mask] = {}
        self.at: dict[Site, Whose] = {}
        self._first = run.origin if reference is None else RunOrigin(reference.name)
        self._numbers: dict[ColumnOrigin | RunOrigin, int] = {self._first: 0}
        self._wanted = set(wanted)
        theirs = [] if reference is None else list(reference.edits)
        self._shared: set[int] = set()
        self._edits: defaultdict[Site, list[tuple[int, Edit]]] = defaultdict(list)
        for place, edit in enumerate(run.edits):
            self._edits[edit.site].append((place, edit))
            same = next((n for n, other in enumerate(theirs) if _is_same(edit, other)), None)
            if same is not None:
                self._shared.add(place)
                del theirs[same]
        self._lacking: defaultdict[Site, list[Edit]] = defaultdict(list)
        for edit in theirs:
            self._lacking[edit.site].append(edit)
        self._walk(_NOBODY if run.blank else 0)

    def _origin_of(self, number: int) -> ColumnOrigin | None:
        own = next((origin for origin, n in self._numbers.items() if n == number), None)
        return own if isinstance(own, ColumnOrigin) else None

    def holds(self, site: Site, edit: Edit) -> bool:
        """Whether the tokens of an edit are, at some wanted site, those that it brings to its own."""
        number = self._number_of(edit)
        return number != _NOBODY and bool(((self.at[site] == number) | ~self.masks.of_edit(edit)).all())

    def whose(self, site: Site, mask: Mask) -> ColumnOrigin | None:
        """The image that all values of a mask are of at some wanted site; None if that is none."""
        there, chosen = np.broadcast_arrays(self.at[site], mask)
        numbers = np.unique(there[chosen])
        return self._origin_of(int(numbers[0])) if len(numbers) == 1 else None

    def _walk(self, start: int) -> None:
        whose: Whose = np.full((1, 1, 1), start, dtype=np.int16)
        whose, below = self._after(Site(None, "embed"), whose), -1
        sites = (*self._edits, *self._lacking, *self._wanted)
        layers = {site.layer for site in sites if site.layer is not None}
        for layer in sorted(layers):
            whose, below = self._block(layer, self.anatomy.handed(whose, layer, below, _of_all)), layer

    def _block(self, layer: int, whose: Whose) -> Whose:
        """Whose a block's output is, for whose its input is."""
        found: dict[str, Whose] = {}
        for site in sites_of(layer):
            made_of = self.anatomy.made_of[site.name]
            parts = (self.anatomy.passed(found[of], layer, site.name, of, _of_all) for of in made_of)
            found[site.name] = self._after(site, reduce(_of_both, parts) if made_of else whose)
        output = found["resid_post"]
        # Somebody else may make anything of what such a block returns.
        return np.full_like(output, _NOBODY) if layer in self.run.blocks.through else output

    def _after(self, site: Site, whose: Whose) -> Whose:
        """Whose a value is after its edits, for whose it is before."""
        edits, lacking = self._edits.get(site, ()), self._lacking.get(site, ())
        if not (edits or lacking or site in self._wanted):
            return whose
        to_come = [edit for place, edit in edits if place in self._shared] + list(lacking)
        for place, edit in edits:
            chosen = self.masks.of_edit(edit)
            if place in self._shared:
                whose = np.where(chosen, _where_both_make_it(edit, chosen, whose), whose)
                to_come.remove(edit)
                continue
            number = self._number_of(edit)
            # What the other run holds there is what it holds once all of its own edits are made.
            if any((chosen & self.masks.of_edit(other)).any() for other in to_come):
                number = _NOBODY
            changed = chosen if number == _NOBODY else chosen & (whose != number)
            if (changed != chosen).any():
                self.changes[place] = changed
            new = number if edit.puts_in else _NOBODY
            whose = np.where(chosen if edit.puts_in else changed, np.int16(new), whose)
        for edit in lacking:
            whose = np.where(self.masks.of_edit(edit), np.int16(_NOBODY), whose)
        if site in self._wanted:
            self.at[site] = whose
        return whose

    def _number_of(self, edit: Edit) -> int:
        """A number for what an edit brings to where it comes from."""
        if edit.source is None or not brings(edit, imagined=self.masks.imagined):
            return _NOBODY
        origin = edit.source.origin
        is_known = isinstance(origin, ColumnOrigin) or origin == self._first
        return self._numbers.setdefault(origin, len(self._numbers)) if is_known else _NOBODY


def _where_both_make_it(edit: Edit, chosen: Mask, whose: Whose) -> Whose:
    """Whose an edit's tokens are that both runs make: the other run's where it puts in the same, or makes the
    same of the same."""
    same = (whose == 0) | ~chosen
    if operator_of(edit.spec) not in BUILT_IN:  # it may make something of all of its tokens
        same = np.asarray(same.all(axis=(1, 2), keepdims=True))
    return np.where(edit.puts_in | same, np.int16(0), np.int16(_NOBODY))


def _is_same(one: Edit, other: Edit) -> bool:
    """Whether two edits are written alike."""
    return replace(one, where="") == replace(other, where="")


def _of_all(whose: Whose, axis: int) -> Whose:
    """Whose several tokens or heads are together."""
    if whose.shape[axis] == 1:
        return whose
    first = whose.take([0], axis=axis)
    return np.where((whose == first).all(axis=axis, keepdims=True), first, np.int16(_NOBODY))


def _of_both(one: Whose, other: Whose) -> Whose:
    """Whose it is what is made of two values."""
    return one if one is other else np.where(one == other, one, np.int16(_NOBODY))
