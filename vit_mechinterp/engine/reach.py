"""What reaches the output, or somebody who reads values of a run: which interventions, and whether its base.

An intervention reaches nobody where it changes nothing that is read: a direction times zero, a direction or
gate of zeros, values that nobody reads, or that later interventions write over before anybody does. It is
made at the tokens and heads that are read alone, where it does the same to each of them. Nothing of a base
does where all that is read of the residual stream is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from vit_mechinterp.engine.alone import Alone
from vit_mechinterp.engine.bound import BoundRun, Edit
from vit_mechinterp.engine.liveness import Live, Liveness
from vit_mechinterp.engine.ops import Operator, add_direction, inject_subspace, operator_of
from vit_mechinterp.engine.positions import BoolArray, Positions, where
from vit_mechinterp.engine.values import Read
from vit_mechinterp.spec import AddDirection, TensorRef

__all__ = ["Reach"]

_FACTORS: Mapping[Operator, str] = {add_direction: "vector", inject_subspace: "gate"}
"""The tensor that the change which an operator makes is a multiple of."""


class Reach:
    """What reaches the output of one model, or what somebody reads of a run.

    Args:
        liveness: finds what is read of a run's values.
        tensors: the given tensors, where they are known.
        alone: finds edits that do the same to each of their tokens.
    """

    def __init__(self, liveness: Liveness, tensors: Mapping[TensorRef, Tensor] | None, alone: Alone) -> None:
        self.liveness, self.tensors, self.alone = liveness, tensors, alone
        self.every = Positions(shared=tuple(range(liveness.layout.tokens.n_tokens)))
        self._zeros: dict[TensorRef, BoolArray] = {}
        self._read_of: dict[tuple[object, ...], tuple[Positions, ...]] = {}

    def kept(self, run: BoundRun, reads: Sequence[Read]) -> dict[int, Edit]:
        """Edits of a run that reach its output, or one of what is read of it, by their place in the run."""
        idle = {place: self._idle(edit) for place, edit in enumerate(run.edits)}
        edits = [(place, edit) for place, edit in enumerate(run.edits) if not idle[place].all()]
        own = self.liveness.of(run, edits, reads).own
        found: dict[int, Edit] = {}
        for place, edit in edits:
            live, unmoved = own[place], idle[place]
            if live is not None:
                unmoved = unmoved | ~live.any(axis=(1, 2))
                if unmoved.all():
                    continue
                edit = self._where_read(edit, live)
            if unmoved.any():
                everyone = np.broadcast_to(unmoved, self.liveness.n)
                edit = replace(edit, idle=tuple(np.flatnonzero(everyone).tolist()))
            found[place] = edit
        return found

    def is_rid_of_base(self, run: BoundRun, others: Sequence[Read]) -> bool:
        """Whether nothing that is read of a run, by itself or by others, is its base's from its first edit
        on, and others read nothing before."""
        site = run.edits[0].site
        if any(read.site < site for read in others) or not self.liveness.is_cut(site, run):
            return False
        reads = [*(capture.read for capture in run.captures), *others]
        return not self.liveness.of(run, list(enumerate(run.edits)), reads).before.any()

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

    def _where_read(self, edit: Edit, live: Live) -> Edit:
        """An edit at the tokens and heads where somebody reads what it makes, if it does the same to each."""
        if self.liveness.imagined or not self.alone.acts(edit):
            return edit
        if live.shape[2] > 1:
            edit = edit.with_heads(tuple(np.flatnonzero(live.any(axis=(0, 1))).tolist()))
        sources = () if edit.source is None else (edit.source.positions,)
        tokens = np.asarray(live.any(axis=2))
        key = edit.positions, *sources, tokens.tobytes()
        if key not in self._read_of:
            own = [self.every if positions.is_all else positions for positions in (edit.positions, *sources)]
            self._read_of[key] = tuple(where(tokens, own[0], positions) for positions in own)
        return edit.with_positions(*self._read_of[key])
