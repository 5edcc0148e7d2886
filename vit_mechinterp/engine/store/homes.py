"""Where a store keeps what an experiment needs: under which image column, and in place of which examples."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import ColumnOrigin, Need, Read, origin_of
from vit_mechinterp.engine.rows.sharing import Sharing
from vit_mechinterp.engine.store.forward import Wanted
from vit_mechinterp.spec import Site

__all__ = ["Homes"]


@dataclass(frozen=True)
class Homes:
    """Under which column the values of every image column are kept: the first one that is alike, example by
    example, or one that holds all of its images somewhere.

    Args:
        sharing: the images' numbers.
        joined: by column, another one that holds all of its images, and keeps their values.
    """

    sharing: Sharing
    joined: Mapping[str, str] = field(default_factory=dict)

    def joining(self, forms: Mapping[str, Collection[Wanted]]) -> Homes:
        """Every column joined to another that can keep its values, if there is one, and to no other.

        Args:
            forms: what is stored of every column, each under its own name.
        """
        images = {column: set(self.sharing.images[column].tolist()) for column in forms}
        homes: list[str] = []
        joined: dict[str, str] = {}
        for column in sorted(forms, key=lambda own: len(images[own]), reverse=True):
            holding = (home for home in homes if images[column] <= images[home])
            keeping = (
                home
                for home in holding
                if _can_keep(forms[home], forms[column], more=len(images[home]) > len(images[column]))
            )
            if (home := next(keeping, None)) is None:
                homes.append(column)
            else:
                joined[column] = home
        return replace(self, joined=joined)

    def of(self, column: str) -> str:
        """The column that a column's values are kept under."""
        alike = self.sharing.first_alike(column)
        return self.joined.get(alike, alike)

    def form(self, need: Need) -> Wanted:
        """What is stored for a need: the column's own values, of tokens that belong to the image."""
        if isinstance(need, ColumnOrigin):
            return None
        origin = origin_of(need)
        own = ColumnOrigin(self.of(origin.column))
        if need.positions.each is not None and not self._is_in_place(origin):
            return Read(own, need.site)
        return Read(own, need.site, need.positions, need.heads)

    def places(self, need: Need, examples: IntArray) -> IntArray:
        """The examples in whose place of the column the images stand."""
        origin = origin_of(need)
        places = self.sharing.places_of(origin)[examples]
        return self._moved(origin.column)[places] if self._is_joined(origin.column) else places

    def _is_joined(self, column: str) -> bool:
        return self.sharing.first_alike(column) in self.joined

    def _is_in_place(self, origin: ColumnOrigin) -> bool:
        """Whether the values of every example stand in its own place."""
        return origin.permutation is None and not self._is_joined(origin.column)

    def _moved(self, column: str) -> IntArray:
        """For every example of a column, the first one of the joined column that has the same image."""
        images, home = self.sharing.images, self.of(column)

        def find() -> IntArray:
            numbers, first = np.unique(images[home], return_index=True)
            found: IntArray = first[np.searchsorted(numbers, images[column])]
            return found

        return self.sharing.once(("moved", column, home), find)


def _can_keep(home: Collection[Wanted], own: Collection[Wanted], *, more: bool) -> bool:
    """Whether what is stored of a column can be kept of one that holds all of its images, or ``more``."""
    # Of a value that is there of some images alone, the folder keeps nothing.
    return _whole_where_chosen(own, home) and (not more or _are_among(own, home))


def _whole_where_chosen(own: Collection[Wanted], home: Collection[Wanted]) -> bool:
    """Whether all tokens are kept, of one column or the other, where examples of the first choose theirs."""
    whole = _whole_sites(own) | _whole_sites(home)
    return all(read.site in whole for read in own if read is not None and read.positions.each is not None)


def _are_among(own: Collection[Wanted], home: Collection[Wanted]) -> bool:
    """Whether everything that is kept of one column is kept of another one, by itself or with more."""
    whole = _whole_sites(home)
    return {_place(read) for read in own if read is None or read.site not in whole} <= {*map(_place, home)}


def _place(form: Wanted) -> Hashable:
    """What is kept, whichever column it is of."""
    return None if form is None else (form.site, form.positions, form.heads)


def _whole_sites(forms: Collection[Wanted]) -> set[Site]:
    reads = (read for read in forms if read is not None)
    return {read.site for read in reads if read.positions.is_all and read.heads is None}
