"""What a store gives out: rows by example, in any order, wherever they are, or computed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.checks import check_listed, is_integer, is_truth
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.results.collect import in_native_order
from vit_mechinterp.engine.store.source import Source
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.cache import ActivationCache, BySite

__all__ = ["StoredActivations", "StoredSite"]


class StoredSite:
    """Activations at one site, by example; a map-style dataset for PyTorch's loaders.

    ``rows[7]`` is one example's activation, ``rows[8:16]`` and ``rows[[5, 1, 9]]`` (or a tensor or array of
    indices, in any order, or a mask) are ``[example, ...]`` in the site's own axis order, on the model's
    device; where examples differ in their number of selected tokens, a list of tensors.

    Args:
        source: where they are read, or computed again.
        read: what they are.
    """

    def __init__(self, source: Source, read: Read) -> None:
        self._source = source
        self._read = read

    def __len__(self) -> int:
        return self._source.data.n

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the activations as they are kept."""
        return self._source.holdings.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that are kept of all examples; what equal images have in common is kept once."""
        entry = self._source.holdings.entry(self._read)
        return 0 if entry is None else entry.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """``[example, ...]``.

        Raises:
            SpecError: examples differ in their number of tokens.
        """
        first = self.take([0])
        if isinstance(first, list):
            raise SpecError(
                f"{self._read.site} is kept at tokens that differ in number between examples, so there is "
                "no one shape; each row has its own."
            )
        return (len(self), *first.shape[1:])

    def __getitem__(self, index: Any) -> Tensor | list[Tensor]:
        if isinstance(index, Tensor):
            index = index.cpu().numpy()
        try:
            chosen = np.arange(len(self))[index]
        except (IndexError, ValueError, OverflowError) as error:
            raise IndexError(f"{self!r} is indexed by numbers of examples, not {index!r}: {error}.") from None
        return self.take([int(chosen)])[0] if np.ndim(chosen) == 0 else self.take(chosen)

    def __iter__(self) -> Iterator[Tensor | list[Tensor]]:
        return (self[i] for i in range(len(self)))

    def take(self, examples: Iterable[int]) -> Tensor | list[Tensor]:
        """Activations of some examples, in the order given.

        Args:
            examples: their numbers, 0 to n - 1 or -n to -1, or a mask of n truth values; of no examples,
                nothing is given, in the same form.

        Raises:
            SpecError: there is no such example, or these are neither.
        """
        return _taken(self._source, {"": self._read}, _checked(examples, len(self)))[""]

    def __repr__(self) -> str:
        return f"StoredSite({self._read.site}, {len(self)} examples, {self.dtype})"


class StoredActivations(BySite[StoredSite]):
    """Activations of one image column by site; made by `ActivationStore.capture`.

    A row that no tier has any longer, or that is damaged on disk, is computed again when it is asked for: the
    view holds on to the model and the data. Weights must stay as they were.

    Args:
        source: where they are read, or computed again.
        reads: what they are, by site name.
    """

    def __init__(self, source: Source, reads: dict[str, Read]) -> None:
        super().__init__({name: StoredSite(source, read) for name, read in reads.items()})
        self._source = source
        self._reads = reads
        self.n_examples = source.data.n

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(self._reads)

    @property
    def rows_per_forward(self) -> int:
        """Images that passed through the model together."""
        return self._source.holdings.rows

    def take(self, examples: Iterable[int]) -> ActivationCache | dict[str, Tensor | list[Tensor]]:
        """All sites at some examples; what has to be computed is computed in one forward for all of them.

        Args:
            examples: as in `StoredSite.take`.

        Raises:
            SpecError: there is no such example, or these are neither numbers nor a mask.
        """
        return _taken(self._source, self._reads, _checked(examples, self.n_examples))

    def __repr__(self) -> str:
        lines = [f"\n  {site!r}" for site in self.values()]
        return f"{type(self).__name__}:{''.join(lines)}"


def _checked(examples: Any, n: int) -> IntArray:
    """Numbers of the examples that are named by numbers, or selected by a mask; 0 to n - 1.

    Raises:
        SpecError: they are neither.
    """
    if isinstance(examples, Iterable) and not isinstance(examples, Sized):
        examples = list(examples)
    check_listed(examples, n)
    own = examples.tolist() if isinstance(examples, (Tensor, np.ndarray)) else list(examples)
    if any(map(is_truth, own)):
        if len(own) != n or not all(map(is_truth, own)):
            raise SpecError(
                f"This mask of {len(own)} entries selects no examples: it must have one truth value for each "
                f"of the {n}. Give such a mask, or numbers of examples, 0 to {n - 1}."
            )
        return np.flatnonzero(list(map(bool, own)))
    if not all(map(is_integer, own)):
        raise SpecError(f"examples={examples!r} are no numbers of examples, 0 to {n - 1}.")
    numbers = list(map(operator.index, own))
    if (other := next((number for number in numbers if not -n <= number < n), None)) is not None:
        raise SpecError(f"There is no example {other}: the {n} are numbered 0 to {n - 1}, or -{n} to -1.")
    return np.asarray(numbers, dtype=np.int64) % n


def _taken(source: Source, reads: Mapping[str, Read], examples: IntArray) -> dict[str, Tensor | list[Tensor]]:
    """Activations at some examples, by name; of no examples, as many of the shape that they would have."""
    asked = examples if len(examples) else np.zeros(1, dtype=np.int64)
    items = source.take(dict.fromkeys(reads.values(), asked))
    shown = {name: _shown(source, read, items[read], asked) for name, read in reads.items()}
    return shown if len(examples) else {name: own[:0] for name, own in shown.items()}


def _shown(source: Source, read: Read, items: Tensor, examples: IntArray) -> Tensor | list[Tensor]:
    if read.positions.is_all:
        return in_native_order(read, items, None)
    everyone = np.asarray(read.positions.counts(range(source.data.n), 0))
    equal = bool((everyone == everyone[0]).all())
    return in_native_order(read, items, everyone[examples].tolist(), equal=equal)
