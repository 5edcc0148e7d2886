"""What is read of every value of a run: edits are walked through from the last to the first.

A mask says at which tokens, and in which heads, somebody reads a value: the output, a capture, another run.
From behind a part of a block to before it, a mask goes along what the part makes its output of: attention
spreads it over all tokens, the rest of a block leaves every token to itself (where that has been tried out).
What puts something in takes its tokens out of the mask: nobody reads what was there before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vit_mechinterp.engine.bound import BoundRun, Edit
from vit_mechinterp.engine.ops import BUILT_IN, ablate, acts_by_token, interchange, operator_of
from vit_mechinterp.engine.positions import BoolArray, Positions
from vit_mechinterp.engine.values import Read
from vit_mechinterp.model.layout import Layout
from vit_mechinterp.model.read_tokens import ReadTokens
from vit_mechinterp.spec import BLOCK_SITES, Site, TokenBox, TokenColumn

__all__ = ["CUTS", "Live", "Liveness", "puts_in"]

Live = BoolArray
"""``[example or 1, token or 1, head or 1]``."""

CUTS = ("embed", "resid_pre", "resid_mid", "resid_post")
"""Places in or before the blocks that all later ones follow from."""
_SOMETHING: Live = np.ones((1, 1, 1), dtype=np.bool_)


@dataclass(frozen=True)
class Liveness:
    """What is read of the values of runs of one model.

    Args:
        layout: the model's.
        read: the tokens that the output reads of the last block; None for all of them.
        n: number of examples.
        n_heads: number of heads at a site that has heads.
        follows_from: whether the output follows from a site behind the blocks alone.
        is_by_token: whether tokens of a block, by layer, reach each other in its attention call alone.
        handed_on: blocks that are given the output of the one before, or of the embedding, as it is.
        imagined: whether there is no data, so that nobody knows which patches a column selects. A column's
            patches are one more token then.
    """

    layout: Layout
    read: ReadTokens | None
    n: int
    n_heads: Callable[[Site], int]
    follows_from: Callable[[Site], bool]
    is_by_token: Callable[[int], bool]
    handed_on: Callable[[], frozenset[int]]
    imagined: bool = False

    def of(self, run: BoundRun, edits: Sequence[tuple[int, Edit]], reads: Iterable[Read]) -> Walk:
        """Walk through edits of a run, given with their places in it in forward order."""
        walk = Walk(self, run, edits, reads)
        walk.through_all()
        return walk

    def is_cut(self, site: Site, run: BoundRun) -> bool:
        """Whether all that is made of a run's rows behind a site follows from what is there."""
        if site.layer is None and site.name != "embed":
            return self.follows_from(site)
        return site.name in CUTS and not (site.name == "resid_mid" and site.layer in run.blocks.through)


class Walk:
    """One walk: ``own`` is what is read of what each edit makes, by place, None for all that it selects, and
    ``before`` what is read of the values that the first edit is given."""

    def __init__(
        self, model: Liveness, run: BoundRun, edits: Sequence[tuple[int, Edit]], reads: Iterable[Read]
    ) -> None:
        self.model, self.run = model, run
        self.own: dict[int, Live | None] = {}
        self.edits: defaultdict[Site, list[tuple[int, Edit]]] = defaultdict(list)
        self.reads: defaultdict[Site, list[Read]] = defaultdict(list)
        for place, edit in edits:
            self.edits[edit.site].append((place, edit))
        for read in reads:
            self.reads[read.site].append(read)
        columns = {e.spec.tokens for _, e in edits if _is_column(e)} if model.imagined else set()
        self.n_tokens = model.layout.tokens.n_tokens
        self.columns = {tokens: self.n_tokens + n for n, tokens in enumerate(columns)}
        self.width = self.n_tokens + len(columns)
        self.all: Live = np.ones((1, self.width, 1), dtype=np.bool_)
        self.first = edits[0][0] if edits else 0
        self.before = self.all

    def through_all(self) -> None:
        """Walk from the output to the first edit."""
        live, above = self._behind_blocks(), self.model.layout.n_layers
        for layer in sorted({site.layer for site in self.edits if site.layer is not None}, reverse=True):
            live, above = self._block(layer, self._handed(live, above, layer)), layer
        embed = Site(None, "embed")
        if embed in self.edits:
            self._at(embed, self._handed(live, above, -1))

    def _behind_blocks(self) -> Live:
        """What is read of what the last block puts out."""
        live = _SOMETHING
        for name in ("logits", "pooled"):
            live = self._behind(Site(None, name), live)
        tokens = self.all
        if self.model.read is not None:
            tokens = np.zeros_like(self.all)
            tokens[0, list(self.model.read.tokens)] = True
        return self._behind(Site(None, "ln_final"), live & tokens)

    def _behind(self, site: Site, live: Live) -> Live:
        if site not in self.edits or self.model.follows_from(site):
            return self._at(site, live)
        return live | self._at(site, live)

    def _handed(self, live: Live, above: int, below: int) -> Live:
        """What is read of a block's output (the embedding's, if that is -1), if something is read of what
        another block is given."""
        if any(below < site.layer < above for site in self.reads if site.layer is not None):
            return self.all
        if live.all() or above == below + 1 == self.model.layout.n_layers:
            return live
        return live if above == below + 1 and above in self.model.handed_on() else self._spread(live)

    def _block(self, layer: int, live: Live) -> Live:
        """What is read of a block's input, for what is read of its output."""
        edits = [edit for site, own in self.edits.items() if site.layer == layer for edit in own]
        later = (edit for _, edit in edits[1:])
        if live.all() and not any(map(puts_in, later)) and not self._leaves_less(*edits[0]):
            self.own.update((place, None) for place, _ in edits)
            return live
        return self._opaque(layer, live) if layer in self.run.blocks.through else self._parts(layer, live)

    def _leaves_less(self, place: int, edit: Edit) -> bool:
        """Whether less than everything may be read of a block's input because of the block's first edit."""
        if not puts_in(edit) or edit.site.name not in CUTS:
            return False
        is_all = edit.positions.is_all or edit.positions.most >= self.n_tokens
        return is_all or (edit.site.name == "resid_pre" and place != self.first)

    def _opaque(self, layer: int, live: Live) -> Live:
        """The same where somebody else acts on what the block returns: all of it may be made of any value."""
        live = self._spread(self._at(Site(layer, "resid_post"), live))
        for name in reversed(BLOCK_SITES[1:-1]):
            self._at(Site(layer, name), live)
        return self._at(Site(layer, "resid_pre"), live)

    def _parts(self, layer: int, live: Live) -> Live:
        """The same, part by part."""

        def at(name: str, live: Live) -> Live:
            found = self._at(Site(layer, name), live)
            alike = (found.all(axis=1) == found.any(axis=1)).all()  # all tokens, or none
            return found if alike or self.model.is_by_token(layer) else self._spread(found)

        family = self.model.layout.family
        output = at("resid_post", live)
        activation = at("mlp.post", at("mlp_out", output))
        mlp_input = at("ln2", at("mlp.pre", activation) | at("mlp.pre_linear", activation))
        stream = at("resid_mid", output if family.parallel else output | mlp_input)
        z = at("attn.z", at("attn.result", at("attn_out", stream)))
        pattern = at("attn.pattern", self._of_any_head(z) if family.mixing else z)
        scores = at("attn.scores", self._of_any_head(pattern) if family.mixing else pattern)
        # Heads of keys and values may serve several of queries.
        q = at("attn.q", scores if self._has_scores(layer) else self._spread(scores))
        k, v = at("attn.k", self._spread(scores)), at("attn.v", self._spread(z))
        normed = self._spread(q) | self._spread(k) | self._spread(v)
        return at("resid_pre", stream | at("ln1", normed | mlp_input if family.parallel else normed))

    def _has_scores(self, layer: int) -> bool:
        """Whether what a query is compared with, and that alone, makes its row of the scores."""
        return f"blocks.{layer}.attn.scores" not in self.model.layout.absent

    def _spread(self, live: Live) -> Live:
        """Every token and head, in examples in which anything is read."""
        return live.any(axis=(1, 2), keepdims=True) & self.all

    def _of_any_head(self, live: Live) -> Live:
        """Tokens that are read in any head."""
        return np.asarray(live.any(axis=2, keepdims=True))

    def _at(self, site: Site, live: Live) -> Live:
        """What is read of a value before its edits are made, for what is read of what is made of it."""
        for read in self.reads.get(site, ()):
            live = live | self._read(read)
        for place, edit in reversed(self.edits.get(site, ())):
            chosen = self._chosen(edit)
            own = live & chosen
            self.own[place] = None if (own == chosen).all() else own
            live = self._before_edit(edit, live, chosen, own)
            if place == self.first:
                self.before = live
        return live

    def _before_edit(self, edit: Edit, live: Live, chosen: Live, own: Live) -> Live:
        if puts_in(edit):
            return live & ~chosen
        if operator_of(edit.spec) in BUILT_IN:
            return live
        # Others may make something of other heads, and of the other tokens that they are given.
        axes = (2,) if acts_by_token(edit.spec) else (1, 2)
        return live | (chosen.any(axis=2, keepdims=True) & own.any(axis=axes, keepdims=True))

    def _read(self, read: Read) -> Live:
        known = read.positions.is_all or not self.model.imagined
        tokens = self._tokens(read.positions) if known else self.all
        return tokens & self._heads(read.site, read.heads)

    def _chosen(self, edit: Edit) -> Live:
        """Tokens and heads that an edit selects."""
        column = self.columns.get(edit.spec.tokens) if _is_column(edit) else None
        if column is None:
            return self._tokens(edit.positions) & self._heads(edit.site, edit.spec.heads)
        tokens = np.zeros_like(self.all)
        tokens[0, column] = True
        return tokens & self._heads(edit.site, edit.spec.heads)

    def _tokens(self, positions: Positions) -> Live:
        if positions.is_all:
            return self.all
        return tokens_of(positions, self.model.n, self.width)[:, :, None]

    def _heads(self, site: Site, heads: Sequence[int] | None) -> Live:
        if heads is None:
            return _SOMETHING
        chosen = np.zeros((1, 1, self.model.n_heads(site)), dtype=np.bool_)
        chosen[0, 0, list(heads)] = True
        return chosen


def tokens_of(positions: Positions, n: int, width: int) -> BoolArray:
    """Tokens of a selection, ``[example or 1, token]``."""
    mask = np.zeros((1 if positions.each is None else n, width), dtype=np.bool_)
    row, position, _ = positions.flat(range(len(mask)))
    mask[row, position] = True
    return mask


def puts_in(edit: Edit) -> bool:
    """Whether an edit puts something in place of what it is given."""
    return operator_of(edit.spec) in (interchange, ablate) and edit.keys.is_all


def _is_column(edit: Edit) -> bool:
    return isinstance(edit.spec.tokens, (TokenColumn, TokenBox))
