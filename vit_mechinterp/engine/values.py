"""Activations at selected tokens, addressed the same way at every site.

Every site is looked at *by token*: ``[row, token, *features]``, where features are ``[d]``, ``[head, d]``, or
``[head, key]`` at attention matrices (whose tokens are the queries). ``pooled`` and ``logits`` are
``[row, d]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.positions import IntArray, Positions
from vit_mechinterp.spec import Site

__all__ = ["ColumnOrigin", "Read", "RunOrigin", "Values", "by_token", "gather"]


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


def by_token(site: Site, value: Tensor) -> Tensor:
    """A view of an activation as ``[row, token, *features]``; its own inverse."""
    return value.transpose(1, 2) if site.is_attention_matrix else value


def gather(
    site: Site, value: Tensor, rows: Sequence[int] | slice, read: Read, examples: Sequence[int]
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
    view = by_token(site, value)[rows]
    if not read.positions.is_all:
        row, position, _ = read.positions.flat(examples)
        view = view[_index(row, value), _index(position, value)]
    if read.heads is not None:
        view = view.index_select(view.ndim - 2, _index(np.asarray(read.heads), value))
    return view


def _index(indices: IntArray, like: Tensor) -> Tensor:
    return torch.as_tensor(indices, device=like.device)


@dataclass
class Values:
    """What one `Read` gave, for a range of examples.

    ``tensor`` is ``[example, token, *features]`` (or ``[example, d]``) if whole activations were read,
    otherwise ``[m, *features]`` with ``starts [example + 1]`` saying where each example's tokens begin.
    """

    tensor: Tensor
    starts: IntArray | None = None

    def whole(self, local: Sequence[int]) -> Tensor:
        """Whole activations of some examples, ``[row, ...]``."""
        return self.tensor[_contiguous(local)]

    def rows(self, local: Sequence[int], *, tokens: bool = True) -> Tensor:
        """Selected tokens of some examples as ``[m, *features]``, row by row.

        ``tokens`` says whether the site has a token axis to flatten.
        """
        if self.starts is None:
            whole = self.whole(local)
            return whole.flatten(0, 1) if tokens else whole
        span = _contiguous(local)
        if isinstance(span, slice):
            return self.tensor[self.starts[span.start] : self.starts[span.stop]]
        index = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in local])
        return self.tensor[_index(index, self.tensor)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tensor.numel() * self.tensor.element_size()


def _contiguous(local: Sequence[int]) -> slice | list[int]:
    """A slice where the indices are consecutive, so that nothing is copied."""
    first, last = local[0], local[-1] + 1
    if last - first == len(local) and all(i == first + n for n, i in enumerate(local)):
        return slice(first, last)
    return list(local)
