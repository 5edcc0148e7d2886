"""Pieces of a schedule: how far clean forwards go, which images they hold, and rows that are copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from vit_mechinterp.engine.positions import IntArray
from vit_mechinterp.spec import Site

__all__ = ["CleanGroup", "Copies", "Stop", "by_owner"]


@dataclass(frozen=True, order=True)
class Stop:
    """Where a forward may stop: before block n (2n), behind it (2n + 1), or at the end of n blocks (2n)."""

    place: int

    @classmethod
    def at_end(cls, n_layers: int) -> Stop:
        """Behind everything."""
        return cls(2 * n_layers)

    @classmethod
    def for_site(cls, site: Site, n_layers: int) -> Stop:
        """Where a forward may stop once this site has been seen."""
        if site.name == "embed":
            return cls(0)
        if site.layer is None:
            return cls.at_end(n_layers)
        return cls(2 * site.layer + (site.name != "resid_pre"))

    @property
    def blocks(self) -> int:
        """How many blocks have run by then."""
        return (self.place + 1) // 2

    def at(self, n_layers: int) -> tuple[int, bool] | None:
        """Layer, and whether the stop comes before its block; None at the end."""
        return None if self == Stop.at_end(n_layers) else (self.place // 2, self.place % 2 == 0)


@dataclass(frozen=True)
class CleanGroup:
    """Images that pass through the model together, as far as ``stop``.

    ``images`` are their numbers, ``sources`` the column and the example that each is taken from.
    """

    stop: Stop
    images: IntArray
    sources: tuple[tuple[str, int], ...]

    def by_column(self) -> list[tuple[str, tuple[int, ...]]]:
        """Examples by column, in the order of the images."""
        grouped = groupby(self.sources, key=lambda source: source[0])
        return [(column, tuple(example for _, example in own)) for column, own in grouped]


@dataclass(frozen=True)
class Copies:
    """Rows of one run that are what rows of another (or of other examples) are."""

    run: str
    examples: IntArray
    owner: str
    owners: IntArray


def by_owner(copies: Iterable[Copies]) -> dict[tuple[str, int], list[tuple[str, int]]]:
    """Rows (run, example) that share another row's values, by that row."""
    found: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    for own in copies:
        for example, owner in zip(own.examples.tolist(), own.owners.tolist(), strict=True):
            found[own.owner, owner].append((own.run, example))
    return found
