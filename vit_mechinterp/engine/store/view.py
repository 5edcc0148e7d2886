"""What a store gives out: rows by example, in any order, wherever they are, or computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.results.collect import in_native_order
from vit_mechinterp.engine.store.source import Source
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.cache import ActivationCache, BySite

__all__ = ["StoredActivations", "StoredSite"]


class StoredSite:
    """Activations at one site, by example; a map-style dataset for PyTorch's loaders.

    ``rows[7]`` is one example's activation, ``rows[8:16]`` and ``rows[[5, 1, 9]]`` (or a tensor or array of
    indices, in any order) are ``[example, ...]`` in the site's own axis order, on the model's device; where
    examples differ in their number of selected tokens, a list of tensors.
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
        except IndexError as error:
            raise IndexError(f"{self!r} is indexed by numbers of examples, not {index!r}: {error}.") from None
        return self.take([int(chosen)])[0] if np.ndim(chosen) == 0 else self.take(chosen)

    def __iter__(self) -> Iterator[Tensor | list[Tensor]]:
        return (self[i] for i in range(len(self)))

    def take(self, examples: Iterable[int]) -> Tensor | list[Tensor]:
        """Activations of some examples, in the order given.

        Raises:
            SpecError: there is no such example.
        """
        chosen = _checked(examples, len(self))
        items = self._source.take({self._read: chosen})[self._read]
        return _shown(self._source, self._read, items, chosen)

    def __repr__(self) -> str:
        return f"StoredSite({self._read.site}, {len(self)} examples, {self.dtype})"


class StoredActivations(BySite[StoredSite]):
    """Activations of one image column by site; made by `ActivationStore.capture`.

    A row that no tier has any longer, or that is damaged on disk, is computed again when it is asked for: the
    view holds on to the model and the data. Weights must stay as they were.
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
        """All sites at some examples; what has to be computed is computed in one forward for all of them."""
        chosen = _checked(examples, self.n_examples)
        items = self._source.take(dict.fromkeys(self._reads.values(), chosen))
        return {name: _shown(self._source, r, items[r], chosen) for name, r in self._reads.items()}

    def __repr__(self) -> str:
        lines = [f"\n  {site!r}" for site in self.values()]
        return f"{type(self).__name__}:{''.join(lines)}"


def _checked(examples: Iterable[int], n: int) -> IntArray:
    chosen = np.asarray(examples if hasattr(examples, "__len__") else list(examples), dtype=np.int64)
    if chosen.size == 0 or chosen.min() < -n or chosen.max() >= n:
        raise SpecError(f"Examples are 0 to {n - 1}, at least one of them; got {chosen.tolist()}.")
    return chosen % n


def _shown(source: Source, read: Read, items: Tensor, examples: IntArray) -> Tensor | list[Tensor]:
    if read.positions.is_all:
        return in_native_order(read, items, None)
    everyone = np.asarray(read.positions.counts(range(source.data.n), 0))
    equal = bool((everyone == everyone[0]).all())
    return in_native_order(read, items, everyone[examples].tolist(), equal=equal)
