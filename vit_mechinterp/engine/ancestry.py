"""Whose clean value every token of a run holds: its edits are walked through from the first to the last.

Numbers stand for the images that clean values are made from, 0 for the run's own base, and one for what is
nobody's. What is made of one image's values alone is that image's (see `Anatomy`). An edit that puts in what
is there already is none at those tokens.
"""

from __future__ import annotations

from collections import defaultdict
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.engine.anatomy import Anatomy, sites_of
from vit_mechinterp.engine.bound import BoundRun, Edit
from vit_mechinterp.engine.masks import Mask, Masks
from vit_mechinterp.engine.ops import inject_subspace, operator_of
from vit_mechinterp.engine.values import ColumnOrigin
from vit_mechinterp.spec import BLOCK_SITES, Site

__all__ = ["brings", "changes"]

Whose = NDArray[np.int16]
"""``[example or 1, token, head or 1]``."""
NOBODY = -1
_BEHIND = BLOCK_SITES[BLOCK_SITES.index("attn.z") :]
"""Sites of a block behind its attention call."""


def changes(anatomy: Anatomy, masks: Masks, run: BoundRun) -> dict[int, Mask]:
    """Where edits change something, by their place, for those that do so at some of their tokens at most.

    Args:
        anatomy: the model's.
        masks: of the run's edits.
        run: the run.
    """
    pairs = zip(run.edits, run.edits[1:], strict=False)
    if not any(_may_be_there(*pair) and brings(pair[1], imagined=masks.imagined) for pair in pairs):
        return {}
    return _Walk(anatomy, masks, run).changes


def brings(edit: Edit, *, imagined: bool) -> bool:
    """Whether an edit brings tokens of an image to where they come from."""
    source, spec = edit.source, edit.spec
    if source is None or not isinstance(source.origin, ColumnOrigin):
        return False
    # Without data the same stands for what all columns select.
    if imagined and getattr(spec, "source_tokens", None) not in (None, spec.tokens):
        return False
    return (source.site, source.positions) == (edit.site, edit.positions) and (
        edit.puts_in or operator_of(spec) is inject_subspace
    )


def _may_be_there(earlier: Edit, edit: Edit) -> bool:
    """Whether tokens may hold what an edit puts in although an earlier one changed others: no attention call
    of all tokens lies between the two."""
    layer, before = edit.site.layer, earlier.site.layer
    if earlier.site.name == "embed":
        return layer == 0
    if layer is None or before is None:
        return False
    return layer == before or (layer == before + 1 and earlier.site.name in _BEHIND)


class _Walk:
    def __init__(self, anatomy: Anatomy, masks: Masks, run: BoundRun) -> None:
        self.anatomy, self.masks, self.run = anatomy, masks, run
        self.changes: dict[int, Mask] = {}
        self._numbers: dict[ColumnOrigin, int] = {run.origin: 0}
        self._edits: defaultdict[Site, list[tuple[int, Edit]]] = defaultdict(list)
        for place, edit in enumerate(run.edits):
            self._edits[edit.site].append((place, edit))
        whose: Whose = np.full((1, 1, 1), NOBODY if run.blank else 0, dtype=np.int16)
        whose, below = self._at(Site(None, "embed"), whose), -1
        for layer in sorted({site.layer for site in self._edits if site.layer is not None}):
            whose, below = self._block(layer, anatomy.handed(whose, layer, below, _of_all)), layer

    def _block(self, layer: int, whose: Whose) -> Whose:
        """Whose a block's output is, for whose its input is."""
        found: dict[str, Whose] = {}
        for site in sites_of(layer):
            made_of = self.anatomy.made_of[site.name]
            parts = (self.anatomy.carried(found[of], layer, site.name, of, _of_all) for of in made_of)
            found[site.name] = self._at(site, reduce(_of_both, parts) if made_of else whose)
        output = found["resid_post"]
        # Somebody else may make anything of what such a block returns.
        return np.full_like(output, NOBODY) if layer in self.run.blocks.through else output

    def _at(self, site: Site, whose: Whose) -> Whose:
        for place, edit in self._edits.get(site, ()):
            chosen, number = self.masks.of_edit(edit), self._number_of(edit)
            changed = chosen if number == NOBODY else chosen & (whose != number)
            if (changed != chosen).any():
                self.changes[place] = changed
            if edit.puts_in:
                whose = np.where(chosen, np.int16(number), whose)
            else:
                whose = np.where(changed, np.int16(NOBODY), whose)
        return whose

    def _number_of(self, edit: Edit) -> int:
        origin = None if edit.source is None else edit.source.origin
        if not isinstance(origin, ColumnOrigin) or not brings(edit, imagined=self.masks.imagined):
            return NOBODY
        return self._numbers.setdefault(origin, len(self._numbers))


def _of_all(whose: Whose, axis: int) -> Whose:
    """Whose several tokens or heads are together."""
    if whose.shape[axis] == 1:
        return whose
    first = whose.take([0], axis=axis)
    return np.where((whose == first).all(axis=axis, keepdims=True), first, np.int16(NOBODY))


def _of_both(one: Whose, other: Whose) -> Whose:
    """Whose it is what is made of two values."""
    if one is other:
        return one
    return np.where(one == other, one, np.int16(NOBODY))
