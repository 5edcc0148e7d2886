"""Which images pass through the model together in clean forwards, and how far."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.stop import Stop
from vit_mechinterp.engine.binding.values import ColumnOrigin, Needs, Read, origin_of
from vit_mechinterp.engine.rows.sharing import Sharing

__all__ = ["CleanGroup", "clean_groups"]


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


def clean_groups(sharing: Sharing, n_layers: int, needs: Needs) -> list[CleanGroup]:
    """Distinct images, grouped by how far they pass through the model; those that go furthest first.

    Args:
        sharing: the images' numbers.
        n_layers: number of blocks of the model.
        needs: what is needed of them.
    """
    stops: dict[tuple[ColumnOrigin, bytes], tuple[IntArray, int]] = {}

    for need, examples in needs.items():
        stop = Stop.for_site(need.site, n_layers) if isinstance(need, Read) else Stop.at_end(n_layers)
        key = origin_of(need), examples.tobytes()
        known = stops.get(key, (examples, 0))
        stops[key] = examples, max(stop.place, known[1])
    if not stops:
        return []
    numbers, places, sources = [], [], []
    for (origin, _), (examples, place) in stops.items():
        numbers.append(sharing.images_of(origin)[examples])
        places.append(np.full(len(examples), place))
        sources += [(origin.column, i) for i in sharing.places_of(origin)[examples].tolist()]
    distinct, first, which = np.unique(np.concatenate(numbers), return_index=True, return_inverse=True)
    furthest = np.zeros(len(distinct), dtype=np.int64)
    np.maximum.at(furthest, which.reshape(-1), np.concatenate(places))
    groups = []
    for place in sorted(set(furthest.tolist()), reverse=True):
        members = np.flatnonzero(furthest == place)
        members = members[np.argsort(first[members], kind="stable")]
        taken_from = tuple(sources[i] for i in first[members].tolist())
        groups.append(CleanGroup(Stop(place), distinct[members], taken_from))
    return groups
