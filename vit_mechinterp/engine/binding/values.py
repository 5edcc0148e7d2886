"""Activations at selected tokens, addressed the same way at every site.

Every site is looked at *by token*: ``[row, token, *features]``, where features are ``[d]``, ``[head, d]``, or
``[head, key]`` at attention matrices (whose tokens are the queries). ``pooled`` and ``logits`` are
``[row, d]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray, within_each
from vit_mechinterp.engine.binding.positions import Positions
from vit_mechinterp.spec import Site

__all__ = [
    "ColumnOrigin",
    "ImagesOf",
    "Need",
    "Needs",
    "Read",
    "RunOrigin",
    "Values",
    "by_token",
    "contiguous",
    "gather",
    "origin_of",
    "permutation",
]


@dataclass(frozen=True)
class ColumnOrigin:
    """The clean forward of an image column; with ``permutation`` (a seed), of another example's image."""

    column: str
    permutation: int | None = None


@dataclass(frozen=True)
class RunOrigin:
    """Another run, for the same example, after its edits."""

    run: str


@dataclass(frozen=True)
class Read:
    """A value that somebody needs: where it comes from, at which site, at which tokens and heads."""

    origin: ColumnOrigin | RunOrigin
    site: Site
    positions: Positions = Positions()
    heads: tuple[int, ...] | None = None


ImagesOf = Callable[[ColumnOrigin], IntArray]
"""Gives numbers of the images that clean values are made from, ``[example]``."""

Need = Read | ColumnOrigin
"""What a clean forward gives: a value, or the output of an image."""

Needs = Mapping[Need, IntArray]
"""What is needed of clean forwards, each with the ascending examples that it is needed of."""


def origin_of(need: Need) -> ColumnOrigin:
    """The images that a need is about."""
    origin = need.origin if isinstance(need, Read) else need
    assert isinstance(origin, ColumnOrigin), f"clean forwards give no values of {origin}"
    return origin


def permutation(seed: int, n: int) -> IntArray:
    """The seeded permutation of a whole dataset that resample ablation draws from."""
    return np.random.default_rng(seed).permutation(n)


def by_token(site: Site, value: Tensor) -> Tensor:
    """A view of an activation as ``[row, token, *features]``; its own inverse."""
    return value.transpose(1, 2) if site.is_attention_matrix else value


def gather(
    site: Site, value: Tensor, rows: IntArray | slice, read: Read, examples: IntArray | Sequence[int]
) -> Tensor:
    """The selected tokens and heads of some rows of an activation.

    Args:
        site: the site that ``value`` was read at.
        value: the activation in its native axis order, ``[row, ...]``.
        rows: the rows that hold ``examples``, in order.
        read: what is selected.
        examples: the example of every row.

    Returns:
        ``[row, token, *features]`` (or ``[row, d]``) if everything is selected, otherwise ``[m, *features]``,
        one row per selected token, row by row.
    """
    view = by_token(site, value)
    if not read.positions.is_all:
        row, position, _ = read.positions.flat(examples)
        row = row + rows.start if isinstance(rows, slice) else rows[row]
        view = view[_index(row, value), _index(position, value)]
    else:
        view = view[rows] if isinstance(rows, slice) else view.index_select(0, _index(rows, value))
    if read.heads is not None:
        view = view.index_select(view.ndim - 2, _index(np.asarray(read.heads), value))
    return view


def _index(indices: IntArray, like: Tensor) -> Tensor:
    return torch.as_tensor(indices, device=like.device)


@dataclass
class Values:
    """What one `Read` gave, for some examples.

    Args:
        tensor: ``[k, token, *features]`` (or ``[k, d]``) if whole activations were read, otherwise
            ``[m, *features]``.
        examples: the examples held, ascending.
        place: for each of them, its row of ``tensor`` (examples of one image share theirs), or its entry of
            ``starts``.
        starts: where the selected tokens of each entry begin in ``tensor``; None for whole activations.
    """

    tensor: Tensor
    examples: IntArray
    place: IntArray
    starts: IntArray | None = None

    def in_memory(self, examples: IntArray | Sequence[int]) -> Values:
        """Values of some examples, and perhaps of others, that need no store to be read."""
        return self

    def whole(self, examples: IntArray | Sequence[int]) -> Tensor:
        """Whole activations of some examples, ``[row, ...]``."""
        places = self._places(examples)
        span = contiguous(places)
        return self.tensor[span] if span is not None else self.tensor[_index(places, self.tensor)]

    def rows(self, examples: IntArray | Sequence[int], *, tokens: bool = True) -> Tensor:
        """Selected tokens of some examples as ``[m, *features]``, row by row.

        ``tokens`` says whether the site has a token axis to flatten.
        """
        if self.starts is None:
            whole = self.whole(examples)
            return whole.flatten(0, 1) if tokens else whole
        places = self._places(examples)
        span = contiguous(places)
        if span is not None:
            return self.tensor[self.starts[span.start] : self.starts[span.stop]]
        counts = self.starts[places + 1] - self.starts[places]
        return self.tensor[_index(np.repeat(self.starts[places], counts) + within_each(counts), self.tensor)]

    def selected(self, need: Need, examples: IntArray | Sequence[int]) -> Tensor:
        """What is needed of some examples, as `whole` gives it, or `rows` where tokens are selected."""
        if not isinstance(need, Read) or need.positions.is_all:
            return self.whole(examples)
        return self.rows(examples, tokens=need.site.has_tokens)

    @classmethod
    def joined(cls, need: Need, pieces: Sequence[tuple[IntArray, Tensor]]) -> Values:
        """Values that come in pieces: examples, and what `selected` would give of them."""
        order = np.concatenate([examples for examples, _ in pieces])
        tensor = pieces[0][1] if len(pieces) == 1 else torch.cat([piece for _, piece in pieces])
        place = np.argsort(order, kind="stable")
        if not isinstance(need, Read) or need.positions.is_all:
            return cls(tensor, order[place], place)
        return cls(
            tensor, order[place], place, np.concatenate([[0], np.cumsum(need.positions.counts(order, 0))])
        )

    def _places(self, examples: IntArray | Sequence[int]) -> IntArray:
        return self.place[np.searchsorted(self.examples, np.asarray(examples, dtype=np.int64))]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tensor.numel() * self.tensor.element_size()


def contiguous(places: IntArray) -> slice | None:
    """A slice where the places are consecutive, so that nothing is copied."""
    if len(places) == 0:
        return slice(0, 0)
    first, last = int(places[0]), int(places[-1]) + 1
    if last - first == len(places) and bool((np.diff(places) == 1).all()):
        return slice(first, last)
    return None
