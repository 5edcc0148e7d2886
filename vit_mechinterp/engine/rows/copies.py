"""Rows that are what other rows are, and so are not computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from vit_mechinterp.engine.arrays import IntArray

__all__ = ["Copies", "by_owner"]


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
