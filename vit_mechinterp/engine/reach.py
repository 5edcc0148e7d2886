"""What reaches the output, or somebody who reads values of a run: which interventions, and whether its base.

An intervention reaches nobody where it changes nothing that is read: a direction times zero, a direction or
gate of zeros, tokens of the last block that the output does not read, and values that a later intervention
writes over, there or where all that follows from them comes out. Nothing of a base does where one replaces
all that is read of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from vit_mechinterp.engine.bound import BoundRun, Edit
from vit_mechinterp.engine.ops import (
    BUILT_IN,
    Operator,
    ablate,
    acts_by_token,
    add_direction,
    inject_subspace,
    interchange,
    operator_of,
)
from vit_mechinterp.engine.positions import BoolArray, Positions, where
from vit_mechinterp.engine.values import Read
from vit_mechinterp.model.layout import Layout
from vit_mechinterp.model.read_tokens import ReadTokens
from vit_mechinterp.spec import BLOCK_SITES, AddDirection, Site, TensorRef

__all__ = ["Reach"]

_FACTORS: Mapping[Operator, str] = {add_direction: "vector", inject_subspace: "gate"}
"""The tensor that the change which an operator makes is a multiple of."""
_STREAM = ("embed", "resid_pre", "resid_mid", "resid_post")
"""Places in or before the blocks that all later ones follow from."""
_BY_QUERY = "attn.q", *BLOCK_SITES[BLOCK_SITES.index("attn.scores") :]
"""Places of a block from which a token's value reaches that token of its output alone, if the block can be
narrowed."""
_OUTLETS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("attn.q", "attn.k"), ("attn.scores", "attn.pattern", "attn.z", "attn_out")),
    "attn.scores": ("attn.pattern", "attn.z", "attn_out"),
    "attn.pattern": ("attn.z", "attn_out"),
    **dict.fromkeys(("attn.v", "attn.z", "attn.result"), ("attn_out",)),
    **dict.fromkeys(("mlp.pre", "mlp.pre_linear"), ("mlp.post", "mlp_out")),
    "mlp.post": ("mlp_out",),
}
"""Places of the same block, each of which all that follows from a value inside attention or MLP passes."""


class Reach:
    """What reaches the output of one model, or what somebody reads of a run.

    Args:
        layout: the model's.
        read: the tokens that the output reads of the last block; None for all of them.
        n: number of examples.
        tensors: the given tensors, where they are known.
        follows_from: whether the output follows from a site behind the blocks alone.
        imagined: whether there is no data, so that nobody knows which patches a column selects.
    """

    def __init__(
        self,
        layout: Layout,
        read: ReadTokens | None,
        n: int,
        tensors: Mapping[TensorRef, Tensor] | None,
        follows_from: Callable[[Site], bool],
        *,
        imagined: bool,
    ) -> None:
        self.last, self.n_tokens, self.n = layout.n_layers - 1, layout.tokens.n_tokens, n
        self.by_output: BoolArray | None = None
        if read is not None:
            self.by_output = np.zeros((1, self.n_tokens), dtype=np.bool_)
            self.by_output[0, list(read.tokens)] = True
        self.tensors, self.follows_from, self.imagined = tensors, follows_from, imagined
        self.every = Positions(shared=tuple(range(self.n_tokens)))
        self._zeros: dict[TensorRef, bool] = {}
        self._output_reads: dict[Positions, bool] = {}
        self._read_of: dict[tuple[object, ...], list[Positions]] = {}

    def kept(self, run: BoundRun, reads: Sequence[Read]) -> dict[int, Edit]:
        """Edits of a run that reach its output, or one of what is read of it, by their place in the run."""
        found: dict[int, Edit] = {}
        for place, edit in enumerate(run.edits):
            later = run.edits[place + 1 :]
            if self._is_nothing(edit) or self._is_written_over(edit, later):
                continue
            if edit.site.layer not in run.blocks.through and _is_shut_in(edit, later, reads):
                continue
            idle = self._unread(edit, later, reads)
            if len(idle) < self.n:
                edit = self._at_read_tokens(edit, later, reads)
                found[place] = replace(edit, idle=idle) if idle else edit
        for place in reversed(list(found)[1:]):
            edit, first = found[place], found[next(iter(found))]
            between = [read for read in reads if first.site <= read.site < edit.site]
            if not between and self._replaces_all(edit, run.edits[place + 1 :], reads, run.blocks.through):
                return {own: edit for own, edit in found.items() if own >= place}
        return found

    def is_rid_of_base(self, run: BoundRun, others: Sequence[Read]) -> bool:
        """Whether nothing that is read of a run, by itself or by others, is its base's from its first edit
        on, and others read nothing before."""
        first, later = run.edits[0], run.edits[1:]
        if not _replaces(first) or any(read.site < first.site for read in others):
            return False
        reads = [*(capture.read for capture in run.captures), *others]
        return self._replaces_all(first, later, reads, run.blocks.through)

    def _replaces_all(
        self, edit: Edit, later: Sequence[Edit], reads: Sequence[Read], through: frozenset[int]
    ) -> bool:
        """Whether an edit writes over everything that is read from its site on."""
        site = edit.site
        if not _replaces(edit):
            return False
        if site.layer is None and site.name != "embed":
            if not self.follows_from(site):
                return False
        elif site.name not in _STREAM or (site.name == "resid_mid" and site.layer in through):
            return False
        if edit.positions.is_all:
            return True
        by_output = self.by_output if self._is_at_end(site) else None
        # Most selections are told to be too small by their length alone.
        if edit.positions.most < (self.n_tokens if by_output is None else int(by_output.sum())):
            return False
        live = self._live(edit, later, reads)
        mask = self._mask(edit.positions)
        return bool(mask.all() if live is None else (mask | ~live).all())

    def _is_nothing(self, edit: Edit) -> bool:
        """Whether an edit changes nothing, whatever it is given."""
        operator = operator_of(edit.spec)
        if isinstance(edit.spec, AddDirection) and operator is add_direction and edit.spec.alpha == 0:
            return True
        factor = _FACTORS.get(operator)
        return any(self._is_zero(ref) for field, ref in edit.refs if field == factor)

    def _is_zero(self, ref: TensorRef) -> bool:
        if self.tensors is not None and ref not in self._zeros:
            self._zeros[ref] = not bool(self.tensors[ref].any())
        return self._zeros.get(ref, False)

    def _is_written_over(self, edit: Edit, later: Sequence[Edit]) -> bool:
        """Whether all that an edit changes is replaced at the same place, before anything is made of it."""
        for other in later:
            if other.site != edit.site or operator_of(other.spec) not in BUILT_IN:
                return False
            if _replaces_change(other, edit) and self._holds(other, edit):
                return True
        return False

    def _holds(self, these: Edit, those: Edit) -> bool:
        """Whether one edit of a run acts on every token that another acts on."""
        if these.positions.is_all:
            return True
        if self.imagined:
            return these.spec.tokens == those.spec.tokens
        if those.positions.is_all:
            return False
        if these.positions == those.positions:
            return True
        return bool((self._mask(these.positions) | ~self._mask(those.positions)).all())

    def _unread(self, edit: Edit, later: Sequence[Edit], reads: Sequence[Read]) -> tuple[int, ...]:
        """Examples in which an edit is made at tokens that nobody reads from its site on."""
        if not self._is_at_end(edit.site) or edit.positions.is_all:
            return ()
        if self._is_output_of(edit.positions):
            return ()
        live = self._live(edit, later, reads)
        if live is None:
            return ()
        unread = ~(live & self._mask(edit.positions)).any(axis=1)
        return tuple(np.flatnonzero(np.broadcast_to(unread, self.n)).tolist())

    def _at_read_tokens(self, edit: Edit, later: Sequence[Edit], reads: Sequence[Read]) -> Edit:
        """An edit at the tokens that somebody reads from its site on, if it does the same to each of them."""
        source, mean = edit.source, edit.mean
        apart = operator_of(edit.spec) in (interchange, ablate) and (mean is None or mean.positions.is_all)
        if not apart or self.imagined or not self._is_at_end(edit.site):
            return edit
        live = self._live(edit, later, reads)
        chosen = [edit.positions, *(() if source is None else (source.positions,))]
        of = [self.every if positions.is_all else positions for positions in chosen]
        if live is None or bool((live | ~self._mask(of[0])).all()):
            return edit
        key = *of, live.tobytes()
        if key not in self._read_of:
            self._read_of[key] = [where(live, of[0], own) for own in of]
        own = self._read_of[key]
        return replace(edit, positions=own[0], source=source and replace(source, positions=own[-1]))

    def _is_output_of(self, positions: Positions) -> bool:
        """Whether the output reads tokens of some selection from the last block on."""
        if positions not in self._output_reads:
            read = self.by_output
            self._output_reads[positions] = read is None or bool((read & self._mask(positions)).any())
        return self._output_reads[positions]

    def _is_at_end(self, site: Site) -> bool:
        """Whether a token's value at a site reaches no other token of what is read."""
        return site.name == "ln_final" or (site.layer == self.last and site.name in _BY_QUERY)

    def _live(self, edit: Edit, later: Sequence[Edit], reads: Sequence[Read]) -> BoolArray | None:
        """Tokens that are read from an edit's site on, ``[example or 1, token]``; None for all of them."""
        if self.by_output is None or not self._is_at_end(edit.site):
            return None
        looked_at = [read.positions for read in reads if edit.site <= read.site and read.site.has_tokens]
        looking = (other for other in later if not acts_by_token(other.spec) and other.site.has_tokens)
        looked_at += [other.positions for other in looking]
        if any(positions.is_all for positions in looked_at) or (looked_at and self.imagined):
            return None
        found = self.by_output
        for positions in looked_at:
            found = found | self._mask(positions)
        return found

    def _mask(self, positions: Positions) -> BoolArray:
        """Tokens selected, ``[example or 1, token]``."""
        mask = np.zeros((1 if positions.each is None else self.n, self.n_tokens), dtype=np.bool_)
        row, position, _ = positions.flat(range(len(mask)))
        mask[row, position] = True
        return mask


def _is_shut_in(edit: Edit, later: Sequence[Edit], reads: Sequence[Read]) -> bool:
    """Whether all that follows from an edit is replaced where it comes out, and nobody reads it before."""
    outlets = _OUTLETS.get(edit.site.name, ())
    for other in later:
        if other.site.layer != edit.site.layer:
            return False
        # Heads of keys may serve several of queries.
        whole = _replaces(other) if edit.site.name == "attn.k" else _replaces_change(other, edit)
        if other.site.name in outlets and whole and other.positions.is_all:
            return not any(edit.site <= read.site < other.site for read in reads)
    return False


def _replaces(edit: Edit) -> bool:
    """Whether nothing is left of the values that an edit is given."""
    return _puts_in(edit) and edit.spec.heads is None


def _replaces_change(edit: Edit, other: Edit) -> bool:
    """Whether nothing is left of what another edit changes of those values."""
    heads, own = other.spec.heads, edit.spec.heads
    return _puts_in(edit) and (own is None or (heads is not None and set(heads) <= set(own)))


def _puts_in(edit: Edit) -> bool:
    """Whether an edit puts something in place of what it is given."""
    return operator_of(edit.spec) in (interchange, ablate) and edit.keys.is_all
