"""What is read of every value of a run: its edits are walked through from the last to the first.

A mask says at which tokens, and in which heads, somebody reads a value: the output, a capture, another run.
From what is made of a value the mask goes to the value (see `Anatomy`). What puts something in takes its
tokens out of the mask: nobody reads what was there before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np

from vit_mechinterp.engine.binding.bound import BoundRun, Edit
from vit_mechinterp.engine.binding.ops import BUILT_IN, acts_by_token, operator_of
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.reduction.anatomy import CUTS, Anatomy, sites_of
from vit_mechinterp.engine.reduction.masks import ALL_OF_IT, NONE_OF_IT, Mask, Masks
from vit_mechinterp.model.output_tokens import OutputTokens
from vit_mechinterp.spec import Site

__all__ = ["Liveness"]


class Liveness:
    """One walk through a run.

    Attributes:
        own: what is read of what each edit makes, by its place; None where it is read wherever it is made.
            Before the last block nothing is left out but what others write over at the same site: edits that
            are made of the same values, and read in part, are to stay the same.
        before: whether anything is read of the values that each edit is given, by its place.

    Args:
        anatomy: the model's.
        masks: of the run's edits.
        by_output: the tokens that the output reads of the last block; None for all of them.
        run: the run.
        edits: its edits that count, with their places in it, in forward order.
        reads: what is read of its values.
        to_end: whether its output is.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        masks: Masks,
        by_output: OutputTokens | None,
        run: BoundRun,
        edits: Sequence[tuple[int, Edit]],
        reads: Iterable[Read],
        *,
        to_end: bool,
    ) -> None:
        self.anatomy, self.masks, self.by_output, self.run = anatomy, masks, by_output, run
        self.to_end = to_end
        self.own: dict[int, Mask | None] = {}
        self.before: dict[int, bool] = {}
        self._first = edits[0][0] if edits else 0
        self._edits: defaultdict[Site, list[tuple[int, Edit]]] = defaultdict(list)
        self._reads: defaultdict[Site, list[Read]] = defaultdict(list)
        for place, edit in edits:
            self._edits[edit.site].append((place, edit))
        for read in reads:
            self._reads[read.site].append(read)
        self._walk()

    def _walk(self) -> None:
        live, above = self._behind_blocks(), self.anatomy.layout.n_layers
        for layer in sorted({site.layer for site in self._edits if site.layer is not None}, reverse=True):
            live, above = self._block(layer, self._handed(live, above, layer)), layer
        if (embed := Site(None, "embed")) in self._edits:
            self._at(embed, self._handed(live, above, -1))

    def _behind_blocks(self) -> Mask:
        """What is read of what the last block puts out."""
        live = ALL_OF_IT if self.to_end else NONE_OF_IT
        for name in ("logits", "pooled"):
            live = self._behind(Site(None, name), live)
        of_stream = ALL_OF_IT if self.by_output is None else self.masks.of_tokens(self.by_output.tokens)
        return self._behind(Site(None, "ln_final"), live & of_stream)

    def _behind(self, site: Site, live: Mask) -> Mask:
        before = self._at(site, live)
        return before if site not in self._edits or self.anatomy.follows_from(site) else live | before

    def _handed(self, live: Mask, above: int, below: int) -> Mask:
        """What is read of what a block puts out, for what is read of what a later one is given."""
        if any(below < site.layer < above for site in self._reads if site.layer is not None):
            return ALL_OF_IT
        return self.anatomy.handed(live, above, below, _anywhere)

    def _block(self, layer: int, live: Mask) -> Mask:
        """What is read of a block's input, for what is read of its output."""
        edits = [edit for site, own in self._edits.items() if site.layer == layer for edit in own]
        cuts = any(edit.puts_in for _, edit in edits[1:])
        if live.all() and not cuts and not self._leaves_less(*edits[0]):
            self.own.update((place, None) for place, _ in edits)
            self.before.update((place, True) for place, _ in edits)
            return live
        if layer in self.run.blocks.through:
            return self._opaque(layer, live)
        found: dict[str, Mask] = {}
        for site in reversed(sites_of(layer)):
            made = self.anatomy.makes[site.name]
            parts = (self.anatomy.passed(found[own], layer, own, site.name, _anywhere) for own in made)
            live = found[site.name] = self._at(site, reduce(np.logical_or, parts) if made else live)
            if self._first in self.own:
                break
        return live

    def _leaves_less(self, place: int, edit: Edit) -> bool:
        """Whether less than everything may be read of a block's input because of the block's first edit."""
        if not edit.puts_in or edit.site.name not in CUTS:
            return False
        is_all = edit.positions.may_be_all(self.anatomy.layout.tokens.n_tokens)
        return is_all or (edit.site.name == "resid_pre" and place != self._first)

    def _opaque(self, layer: int, live: Mask) -> Mask:
        """The same where somebody else acts on what the block returns, and may make it of any value."""
        *inner, output = sites_of(layer)[1:]
        live = self.anatomy.over_all_tokens(self._at(output, live), _anywhere)
        for site in reversed(inner):
            live = live | self.anatomy.over_all_tokens(self._at(site, live), _anywhere)
        return self._at(Site(layer, "resid_pre"), live)

    def _at(self, site: Site, live: Mask) -> Mask:
        """What is read of a value before its edits are made, for what is read of what is made of it."""
        for read in self._reads.get(site, ()):
            live = live | self.masks.of_read(read)
        if site not in self._edits:
            return live
        is_last = site.layer in (None, self.anatomy.layout.n_layers - 1)
        written: Mask = NONE_OF_IT
        for place, edit in reversed(self._edits[site]):
            chosen = self.masks.of_edit(edit)
            own = live & chosen
            made = own if is_last else own | (chosen & ~written & _anywhere(own, 1, 2))
            self.own[place] = None if (made == chosen).all() else made
            if edit.puts_in:
                live, written = live & ~chosen, written | chosen
            elif operator_of(edit.spec) not in BUILT_IN:
                # It may make something of other heads, and of the other tokens that it is given.
                touched = _anywhere(own, 2) if acts_by_token(edit.spec) else _anywhere(own, 1, 2)
                live = live | (_anywhere(chosen, 2) & touched)
            self.before[place] = bool(live.any())
        return live


def _anywhere(mask: Mask, *axes: int) -> Mask:
    return np.asarray(mask.any(axis=axes, keepdims=True))
