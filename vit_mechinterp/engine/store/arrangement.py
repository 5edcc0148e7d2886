"""An experiment's image columns in a store: under which each is kept, and the forwards that this takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from vit_mechinterp.engine.arrays import BoolArray, IntArray
from vit_mechinterp.engine.binding.values import Need, Needs, Read, origin_of
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.store.batch import rows_by_default
from vit_mechinterp.engine.store.expectation import expectations, requests_for
from vit_mechinterp.engine.store.forward import Wanted
from vit_mechinterp.engine.store.holdings import Holdings
from vit_mechinterp.engine.store.homes import Homes
from vit_mechinterp.engine.store.keys import Key
from vit_mechinterp.engine.store.memory import in_pages
from vit_mechinterp.engine.store.source import Source
from vit_mechinterp.engine.store.tiers import Tiers
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["Arrangement", "Asked", "Forecast", "with_fewer_forwards"]


@dataclass(frozen=True)
class Asked:
    """What a source is asked for.

    Args:
        need: what it is needed for.
        examples: the examples that it is needed of.
        column: the source's image column.
        form: what is stored.
        places: the column's example in whose place the image of each example stands.
    """

    need: Need
    examples: IntArray
    column: str
    form: Wanted
    places: IntArray

    @property
    def is_chosen(self) -> bool:
        """Whether its tokens are chosen from whole activations, because these are what is stored."""
        is_whole = self.form is not None and self.form.positions.is_all
        return is_whole and isinstance(self.need, Read) and not self.need.positions.is_all


@dataclass(frozen=True)
class Forecast:
    """Clean forwards through a store.

    Args:
        forwards: of each, the image column, an example of every image, and the blocks that they pass through.
        holds: whether the store can hold what several chunks need until the last of them reads it.
        homes: under which column the values of each are kept.
    """

    forwards: list[tuple[str, tuple[int, ...], int]]
    holds: bool
    homes: Homes

    @property
    def evaluations(self) -> int:
        """(row, block) pairs."""
        return sum(len(images) * blocks for _, images, blocks in self.forwards)


class Arrangement:
    """Image columns in a store.

    Args:
        tiers: the store's.
        vit: the model.
        data: the examples.
        schedule: what is asked for.
        batch_size: most rows in one forward, as the experiment was given it.
        homes: under which column the values of each are kept.

    Attributes:
        sources: what gives the values that are kept under a column.
        forms: what is kept of them.
    """

    def __init__(
        self,
        tiers: Tiers,
        vit: HookedViT,
        data: Data,
        schedule: Schedule,
        batch_size: int | Literal["auto"],
        homes: Homes,
    ) -> None:
        self.homes = homes
        self.forms: dict[str, dict[Wanted, None]] = defaultdict(dict)
        for request in requests_for(schedule, homes, schedule.chunks, means=schedule.needs.means_come_first):
            for column, wanted in request.items():
                self.forms[column].update(dict.fromkeys(wanted))
        self.sources: dict[str, Source] = {}
        self._tiers, self._device = tiers, vit.device
        most, model = min(schedule.clean_width, schedule.chunk), vit.fingerprint()
        for column, forms in self.forms.items():
            rows = min(most, rows_by_default(vit))
            images = schedule.sharing.images[column]
            holdings = Holdings(tiers, vit, data, column, images, forms, rows, model=model)
            if batch_size == "auto":
                holdings.adopt_rows(most)
            self.sources[column] = Source(holdings)

    @property
    def rows(self) -> dict[str, int]:
        """Images per clean forward, by image column."""
        return {column: source.holdings.rows for column, source in self.sources.items()}

    def use_rows(self, rows: Mapping[str, int]) -> None:
        """Change the images per clean forward, by image column."""
        for column, source in self.sources.items():
            holdings = source.holdings
            if rows.get(column, holdings.rows) != holdings.rows:
                holdings.use_rows(rows[column])

    def asked(self, needs: Needs) -> Iterator[Asked]:
        """What to ask the sources for."""
        for need, examples in needs.items():
            column, places = self.homes.of(origin_of(need).column), self.homes.places(need, examples)
            yield Asked(need, examples, column, self.homes.form(need), places)

    def expected(
        self, schedule: Schedule, chunks: Iterable[range], *, means: bool
    ) -> list[tuple[Source, dict[Wanted, IntArray]]] | None:
        """What some chunks will ask of every source, and dataset means before them, if the store can hold all
        of it; else None."""
        images = {column: source.holdings.images for column, source in self.sources.items()}
        found = expectations(requests_for(schedule, self.homes, chunks, means=means), images)
        wanted = [(self.sources[column], own.wanted) for column, own in found.items()]
        needed = sum(in_pages(source.holdings.nbytes(form)) for source, forms in wanted for form in forms)
        in_order = all(own.in_order for own in found.values())
        return wanted if self._tiers.holds(needed, self._device, in_order=in_order) else None

    def forecast(self, schedule: Schedule) -> Forecast:
        """The clean forwards that a schedule needs, as the store is, if it loses nothing meanwhile."""
        means = schedule.needs.means_come_first
        expected = self.expected(schedule, schedule.chunks, means=means)
        for source, forms in expected or ():
            source.expect(forms, keep=False)
        foreseen: dict[Key, BoolArray] = {}  # columns of the same distinct images share what is stored
        with ExitStack() as stack:
            for source in self.sources.values():
                stack.enter_context(source.holdings.imagining(foreseen))
            forwards = [
                (column, *forward)
                for request in requests_for(schedule, self.homes, schedule.chunks, means=means)
                for column, wanted in request.items()
                for forward in self.sources[column].foresee(wanted)
            ]
        return Forecast(forwards, expected is not None, self.homes)


def with_fewer_forwards(under: Callable[[Homes], Arrangement], schedule: Schedule) -> Arrangement:
    """The arrangement that takes fewer clean forwards, as the store is: with every column under its own name,
    or with those that others hold all images of under these. For that, what is computed for one has to be
    there when the other is asked for: in one chunk, or because the store can hold it.

    Args:
        under: makes an arrangement of some homes.
        schedule: what is asked for.
    """
    apart = under(Homes(schedule.sharing))
    homes = apart.homes.joining(apart.forms)
    if not homes.joined:
        return apart
    together = under(homes)
    forecast = together.forecast(schedule)
    at_once = len(schedule.chunks) == 1 and not schedule.needs.means_come_first
    fewer = forecast.evaluations <= apart.forecast(schedule).evaluations
    return together if (forecast.holds or at_once) and fewer else apart
