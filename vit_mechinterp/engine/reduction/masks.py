"""Tokens and heads that edits and reads select, as masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vit_mechinterp.engine.arrays import BoolArray
from vit_mechinterp.engine.binding.bound import Edit
from vit_mechinterp.engine.binding.positions import Positions
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.spec import Site, TokenBox, TokenColumn

__all__ = ["ALL_OF_IT", "NONE_OF_IT", "Mask", "Masks"]

Mask = BoolArray
"""``[example or 1, token or 1, head or 1]``; 1 where all of them are meant alike."""
ALL_OF_IT: Mask = np.ones((1, 1, 1), dtype=np.bool_)
NONE_OF_IT: Mask = ~ALL_OF_IT


class Masks:
    """Masks for edits of one run, and for reads of its values.

    Without data nobody knows which patches a column selects: its patches are one more token then, and who
    reads some tokens may read any.

    Args:
        edits: the edits.
        n: number of examples.
        n_tokens: number of tokens.
        n_heads: number of heads at a site that has heads.
        imagined: whether there is no data.
    """

    def __init__(
        self,
        edits: Iterable[Edit],
        n: int,
        n_tokens: int,
        n_heads: Callable[[Site], int],
        *,
        imagined: bool,
    ) -> None:
        self.n, self.n_heads, self.imagined = n, n_heads, imagined
        columns = {edit.spec.tokens for edit in edits if _is_column(edit)} if imagined else set()
        self._columns = {tokens: n_tokens + place for place, tokens in enumerate(columns)}
        self._width = n_tokens + len(columns)

    def of_tokens(self, tokens: Sequence[int]) -> Mask:
        """Some tokens, of every example."""
        mask = np.zeros((1, self._width, 1), dtype=np.bool_)
        mask[0, list(tokens)] = True
        return mask

    def of_edit(self, edit: Edit) -> Mask:
        """Where an edit is made."""
        if self.imagined and _is_column(edit):
            tokens = self.of_tokens([self._columns[edit.spec.tokens]])
        else:
            tokens = self._of(edit.positions)
        return self._with_heads(tokens, edit.site, None if edit.carries else edit.spec.heads)

    def of_read(self, read: Read) -> Mask:
        """What somebody reads."""
        tokens = ALL_OF_IT if self.imagined else self._of(read.positions)
        return self._with_heads(tokens, read.site, read.heads)

    def _of(self, positions: Positions) -> Mask:
        if positions.is_all:
            return ALL_OF_IT
        if positions.each is None:
            return self.of_tokens(positions.shared or ())
        mask = np.zeros((self.n, self._width, 1), dtype=np.bool_)
        row, position, _ = positions.flat(range(self.n))
        mask[row, position] = True
        return mask

    def _with_heads(self, tokens: Mask, site: Site, heads: Sequence[int] | None) -> Mask:
        if heads is None:
            return tokens
        chosen = np.zeros((1, 1, self.n_heads(site)), dtype=np.bool_)
        chosen[0, 0, list(heads)] = True
        return tokens & chosen


def _is_column(edit: Edit) -> bool:
    return isinstance(edit.spec.tokens, (TokenColumn, TokenBox))
