"""What reaches the output, or somebody who reads values of a run: which interventions, and whether its base.

An intervention reaches nobody where it changes nothing that is read: a direction times zero, a direction or
gate of zeros, a value that is there already, values that nobody reads, or that later interventions write over
before anybody does. It is made at the tokens and heads where it changes what is read alone, if it does the
same to each of them. Nothing of a base does where all that is read of the residual stream is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from vit_mechinterp.engine.arrays import BoolArray
from vit_mechinterp.engine.binding.bound import BoundRun, Edit
from vit_mechinterp.engine.binding.ops import Operator, add_direction, inject_subspace, operator_of
from vit_mechinterp.engine.binding.positions import Positions, where
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read
from vit_mechinterp.engine.reduction.alone import Alone
from vit_mechinterp.engine.reduction.anatomy import CUTS, Anatomy
from vit_mechinterp.engine.reduction.ancestry import Ancestry, brings, may_hold
from vit_mechinterp.engine.reduction.carrying import carried
from vit_mechinterp.engine.reduction.liveness import Liveness
from vit_mechinterp.engine.reduction.masks import Mask, Masks
from vit_mechinterp.engine.reduction.postponing import postponed
from vit_mechinterp.model.output_tokens import OutputTokens
from vit_mechinterp.spec import AddDirection, Site, TensorRef

__all__ = ["Kept", "Reach"]

_FACTORS: Mapping[Operator, str] = {add_direction: "vector", inject_subspace: "gate"}
"""The tensor that the change which an operator makes is a multiple of."""


@dataclass(frozen=True)
class Kept:
    """What of a run reaches what is read: edits by their place in it, and whether anything is read of the
    values that the first of them is given."""

    edits: Mapping[int, Edit] = field(default_factory=dict)
    of_first: bool = True


class Reach:
    """What reaches the output of one model, or what somebody reads of a run.

    Args:
        anatomy: the model's.
        by_output: the tokens that the output reads of the last block; None for all of them.
        n: number of examples.
        tensors: the given tensors, where they are known.
        alone: finds edits that do the same to each of their tokens.
        adding_up: blocks that put out the sum of their input and of what attention and MLP add.
        imagined: whether there is no data, so that nobody knows which patches a column selects.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        by_output: OutputTokens | None,
        n: int,
        tensors: Mapping[TensorRef, Tensor] | None,
        alone: Alone,
        adding_up: Callable[[], frozenset[int]],
        *,
        imagined: bool,
    ) -> None:
        self.anatomy, self.by_output, self.n = anatomy, by_output, n
        self.tensors, self.alone, self.imagined = tensors, alone, imagined
        self.adding_up = adding_up
        self.every = Positions(shared=tuple(range(anatomy.layout.tokens.n_tokens)))
        self._zeros: dict[TensorRef, BoolArray] = {}
        self._narrowed: dict[tuple[object, ...], tuple[Positions, ...]] = {}

    def acting(self, run: BoundRun) -> dict[int, Edit]:
        """Edits of a run that may change what they are given, by their place in the run, each with the
        examples in which it may not. The first of them puts in no value of the run's own base."""
        found: dict[int, Edit] = {}
        for place, edit in enumerate(run.edits):
            left = self._with_idle(edit, self._idle(edit))
            if left is not None and (found or not self._puts_back(run, edit)):
                found[place] = left
        return found

    def _puts_back(self, run: BoundRun, edit: Edit) -> bool:
        """Whether an edit puts in its base's own value where that is there still."""
        source = edit.source
        return source is not None and source.origin == run.origin and self._brings(edit)

    def kept(self, run: BoundRun, reads: Sequence[Read], *, to_end: bool) -> Kept:
        """What of a run reaches its output, if that counts (``to_end``), or one of what is read of it."""
        if to_end and self._are_all_read(run.edits):
            return Kept(dict(enumerate(run.edits)))
        masks, edits = self._masks(run.edits), list(enumerate(run.edits))
        liveness = Liveness(self.anatomy, masks, self.by_output, run, edits, reads, to_end=to_end)
        kept = self._made_at(run, liveness.own)
        return Kept(kept, not kept or liveness.before[min(kept)])

    def _are_all_read(self, edits: Sequence[Edit]) -> bool:
        """Whether edits are told to reach the output at a glance: none is in the last block or behind it, and
        none writes over a whole stream, or over what one in its block or the block before has changed."""
        before, n_tokens = None, self.anatomy.layout.tokens.n_tokens
        for edit in edits:
            layer = edit.site.layer
            if layer is None or layer == self.anatomy.layout.n_layers - 1:
                return False
            if edit.puts_in and before is not None and layer - before <= 1:
                return False
            if edit.puts_in and edit.site.name in CUTS and edit.positions.may_be_all(n_tokens):
                return False
            before = layer
        return True

    def changing(self, run: BoundRun, others: Mapping[str, BoundRun]) -> dict[int, Edit]:
        """Edits of a run that do not put in what is there already, by their place in the run.

        ``others`` are the runs that it reads, by name.
        """
        where: dict[int, Mask] = {}
        pairs = zip(run.edits, run.edits[1:], strict=False)
        if any(may_hold(earlier, edit.site) and self._brings(edit) for earlier, edit in pairs):
            where |= Ancestry(self.anatomy, self._masks(run.edits), run).changes
        reading = (edit for edit in run.edits if edit.source_run is not None and not self.imagined)
        for name in {edit.source_run or "" for edit in reading if self._brings(edit)}:
            other = others[name]
            if other.origin == run.origin and not (run.blank or other.blank or other.clean_before):
                where |= Ancestry(self.anatomy, self._masks(run.edits), run, reference=other).changes
        return self._made_at(run, where)

    def _brings(self, edit: Edit) -> bool:
        return brings(edit, imagined=self.imagined)

    def whose(self, read: Read, run: BoundRun) -> ColumnOrigin | None:
        """The image whose clean value a run holds where it is read; None if that is none."""
        if run.is_clean_at(read.site):
            return run.origin
        before = [edit for edit in run.edits if edit.site <= read.site]
        if not before:  # it is another run's from here on, and that one's edits come later
            return None if run.blank else run.origin
        if self.imagined or not any(may_hold(edit, read.site) for edit in before):
            return None
        masks = self._masks(run.edits)
        return Ancestry(self.anatomy, masks, run, [read.site]).whose(read.site, masks.of_read(read))

    def carried(self, run: BoundRun, reads: Sequence[Read]) -> tuple[Edit, ...]:
        """Edits of a run, the first of them behind all blocks that add its difference up alone."""
        return carried(self.anatomy, self.adding_up, run, reads)

    def postponed(self, run: BoundRun, reads: Sequence[Read]) -> tuple[Edit, ...]:
        """Edits of a run, each at the last place where it does the same to what is read."""
        return postponed(self.anatomy, self._masks(run.edits), run, reads)

    def unread(self, run: BoundRun, reads: Sequence[Read], *, to_end: bool) -> frozenset[Site]:
        """Sites of a run at which nothing is read of what its edits there are given: neither by its output,
        if that counts (``to_end``), nor by ``reads``."""
        masks, edits = self._masks(run.edits), list(enumerate(run.edits))
        before = Liveness(self.anatomy, masks, self.by_output, run, edits, reads, to_end=to_end).before
        first = {edit.site: place for place, edit in reversed(edits)}
        return frozenset(site for site, place in first.items() if not before[place])

    def is_rid_of_base(self, run: BoundRun, others: Sequence[Read]) -> bool:
        """Whether a run of whose first edit's values nothing is read holds nothing of its base from there on,
        and others read nothing before."""
        site = run.edits[0].site
        return not any(read.site < site for read in others) and self.anatomy.is_cut(site, run)

    def _masks(self, edits: Iterable[Edit]) -> Masks:
        n_tokens = len(self.every.shared or ())
        return Masks(edits, self.n, n_tokens, self.anatomy.n_heads, imagined=self.imagined)

    def _idle(self, edit: Edit) -> BoolArray:
        """Examples in which an edit changes nothing, whatever it is given, ``[example or 1]``."""
        operator = operator_of(edit.spec)
        if isinstance(edit.spec, AddDirection) and operator is add_direction and edit.spec.alpha == 0:
            return np.ones(1, dtype=np.bool_)
        factor = dict(edit.refs).get(_FACTORS.get(operator, ""))
        if factor is None or self.tensors is None:
            return np.zeros(1, dtype=np.bool_)
        if factor not in self._zeros:
            tensor = self.tensors[factor]
            self._zeros[factor] = (tensor.reshape(len(tensor), -1) == 0).all(dim=1).cpu().numpy()
        zeros = self._zeros[factor]
        chosen = edit.choice is not None and operator is add_direction
        return zeros[edit.choices] if chosen else np.asarray(zeros.all(keepdims=True))

    def _made_at(self, run: BoundRun, where: Mapping[int, Mask | None]) -> dict[int, Edit]:
        """Edits of a run where they count, by their place in the run: at the tokens and heads of a mask, if
        it has one."""
        found: dict[int, Edit] = {}
        for place, edit in enumerate(run.edits):
            mask, made = where.get(place), edit
            if mask is not None and mask.any() and not self.imagined and self.alone.acts(edit):
                made = self._at(edit, mask)
            left = made if mask is None else self._with_idle(made, ~np.asarray(mask.any(axis=(1, 2))))
            if left is not None:
                found[place] = left
        return found

    def _with_idle(self, edit: Edit, idle: BoolArray) -> Edit | None:
        """An edit with more examples ``[example or 1]`` in which it is idle; None where it is in all."""
        if not idle.any():
            return edit
        everyone = {*edit.idle, *np.flatnonzero(np.broadcast_to(idle, self.n)).tolist()}
        return None if len(everyone) == self.n else replace(edit, idle=tuple(sorted(everyone)))

    def _at(self, edit: Edit, mask: Mask) -> Edit:
        """An edit at the tokens and heads of a mask."""
        if mask.shape[2] > 1:
            edit = edit.with_heads(tuple(np.flatnonzero(mask.any(axis=(0, 1))).tolist()))
        if mask.shape[1] == 1:
            return edit
        sources = () if edit.source is None else (edit.source.positions,)
        tokens = np.asarray(mask.any(axis=2))
        key = edit.positions, *sources, tokens.tobytes()
        if key not in self._narrowed:
            own = [self.every if positions.is_all else positions for positions in (edit.positions, *sources)]
            self._narrowed[key] = tuple(where(tokens, own[0], positions) for positions in own)
        return edit.with_positions(*self._narrowed[key])
