"""Clean forwards of an experiment through a store: read what is there, compute and keep what is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from vit_mechinterp.engine.arrays import BoolArray, IntArray
from vit_mechinterp.engine.binding.values import Need, Needs, Read, Values, by_token, gather
from vit_mechinterp.engine.forwards.clean import Clean, CleanPass, Tick
from vit_mechinterp.engine.inputs.ahead import Request
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.store.batch import rows_by_default
from vit_mechinterp.engine.store.expectation import expectations, requests_for
from vit_mechinterp.engine.store.forward import Wanted
from vit_mechinterp.engine.store.holdings import Holdings
from vit_mechinterp.engine.store.keys import Key
from vit_mechinterp.engine.store.memory import in_pages
from vit_mechinterp.engine.store.needs import places_of, stored_form, stored_origin
from vit_mechinterp.engine.store.source import Source
from vit_mechinterp.engine.store.tiers import Tiers
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["Forecast", "StoredClean"]


@dataclass(frozen=True)
class _Asked:
    """What a source is asked for.

    Args:
        column: the source's image column.
        form: what is stored.
        examples: of which examples.
        place: which of these stands for each of the examples that it is needed of.
    """

    column: str
    form: Wanted
    examples: IntArray
    place: IntArray

    @property
    def counts(self) -> IntArray:
        """Number of stored items of every example that is asked for."""
        if self.form is None or self.form.positions.is_all:
            return np.ones(len(self.examples), dtype=np.int64)
        return np.asarray(self.form.positions.counts(self.examples, 0))


@dataclass(frozen=True)
class Forecast:
    """Clean forwards through a store.

    Args:
        forwards: of each, the image column, an example of every image, and the blocks that they pass through.
        holds: whether the store can hold what several chunks need until the last of them reads it.
    """

    forwards: list[tuple[str, tuple[int, ...], int]]
    holds: bool


class StoredClean(CleanPass):
    """Reads clean values out of a store, or computes and keeps them: the same bits in every experiment.

    Args:
        tiers: the store's.
        vit: the model.
        data: the examples.
        schedule: the work.
        batch_size: most rows in one forward, as the experiment was given it.

    Attributes:
        rows: images per clean forward, by image column.
    """

    def __init__(
        self,
        tiers: Tiers,
        vit: HookedViT,
        data: Data,
        schedule: Schedule,
        batch_size: int | Literal["auto"],
    ) -> None:
        most = min(schedule.clean_width, schedule.chunk)
        model = vit.fingerprint()
        reads: dict[str, dict[Wanted, None]] = defaultdict(dict)
        for request in requests_for(schedule, schedule.chunks, means=schedule.needs.means_come_first):
            for column, wanted in request.items():
                reads[column].update(dict.fromkeys(wanted))
        self.tiers = tiers
        self.device = vit.device
        self.sources: dict[str, Source] = {}
        for column, own in reads.items():
            rows = min(most, rows_by_default(vit))
            images = schedule.sharing.images[column]
            holdings = Holdings(tiers, vit, data, column, images, own, rows, model=model)
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

    def expect(self, schedule: Schedule, chunks: Iterable[range], *, means: bool) -> None:
        """Be told which chunks will be asked for, and whether dataset means will be before: where the store
        can hold it until then, one forward gives all that any of them needs of an image."""
        for source, forms in self._held(schedule, chunks, means=means) or ():
            source.expect(forms)

    def _held(
        self, schedule: Schedule, chunks: Iterable[range], *, means: bool
    ) -> list[tuple[Source, dict[Wanted, IntArray]]] | None:
        """What will be asked for of every source, if the store can hold all of it; else None."""
        images = {column: source.holdings.images for column, source in self.sources.items()}
        found = expectations(requests_for(schedule, chunks, means=means), images)
        wanted = [(self.sources[column], own.wanted) for column, own in found.items()]
        needed = sum(in_pages(source.holdings.nbytes(form)) for source, forms in wanted for form in forms)
        in_order = all(own.in_order for own in found.values())
        return wanted if self.tiers.holds(needed, self.device, in_order=in_order) else None

    def forecast(self, schedule: Schedule) -> Forecast:
        """The clean forwards that a schedule needs, as the store is, if it loses nothing meanwhile."""
        means = schedule.needs.means_come_first
        held = self._held(schedule, schedule.chunks, means=means)
        for source, forms in held or ():
            source.expect(forms, keep=False)
        foreseen: dict[Key, BoolArray] = {}  # columns of the same distinct images share what is stored
        with ExitStack() as stack:
            for source in self.sources.values():
                stack.enter_context(source.holdings.imagining(foreseen))
            forwards = [
                (column, *forward)
                for request in requests_for(schedule, schedule.chunks, means=means)
                for column, wanted in request.items()
                for forward in self.sources[column].foresee(wanted)
            ]
        return Forecast(forwards, held is not None)

    def requests(
        self, schedule: Schedule, chunks: Iterable[range], reads: Sequence[Read] | None = None
    ) -> Iterator[Request]:
        """The batches of images that will be asked for, in order."""
        seen: set[Request] = set()
        for chunk in chunks:
            asked = self._asked(schedule, schedule.needs.of(chunk, reads))
            for column, wanted in _by_column(asked).items():
                for batch in self.sources[column].holdings.missing_batches(wanted):
                    if (column, batch) not in seen:
                        seen.add((column, batch))
                        yield column, batch

    def values(self, schedule: Schedule, need: Need, examples: IntArray) -> Values:
        """One value of some ascending examples, read on its own."""
        asked = self._asked(schedule, {need: examples})[need]
        found = self.sources[stored_origin(schedule, need).column].take({asked.form: asked.examples})
        return _values(need, found[asked.form], asked, examples)

    def _asked(self, schedule: Schedule, needs: Needs) -> dict[Need, _Asked]:
        """What to ask the sources for: equal images once, where their values are stored once."""
        asked: dict[Need, _Asked] = {}
        for need, examples in needs.items():
            form, own = stored_form(schedule, need), places_of(schedule, need, examples)
            column = stored_origin(schedule, need).column
            asked[need] = _Asked(column, form, *self.sources[column].holdings.stored_once(form, own))
        return asked

    def __call__(
        self,
        vit: HookedViT,
        data: Data,
        schedule: Schedule,
        chunk: range,
        reads: Sequence[Read] | None = None,
        tick: Tick = lambda n: None,
    ) -> Clean:
        """What one chunk needs; or, with ``reads``, these alone, for all of its examples."""
        needs = schedule.needs.of(chunk, reads)
        asked = self._asked(schedule, needs)
        clean = Clean()
        for column, wanted in _by_column(asked).items():
            source = self.sources[column]
            if source.holdings.rows > schedule.clean_width:  # memory ran out
                source.holdings.use_rows(schedule.clean_width)
            with source.counting(tick):
                found = source.take(wanted)
            taken = dict.fromkeys(wanted, 0)
            for need, examples in needs.items():
                if asked[need].column != column:
                    continue
                form, begin = asked[need].form, taken[asked[need].form]
                taken[form] += int(asked[need].counts.sum())
                items = found[form][begin : taken[form]]
                clean.values[need] = _values(need, items, asked[need], examples)
        return clean


def _by_column(asked: Mapping[Need, _Asked]) -> dict[str, dict[Wanted, IntArray]]:
    """What to take from every column: needs that are stored alike behind one another."""
    found: dict[str, dict[Wanted, list[IntArray]]] = defaultdict(lambda: defaultdict(list))
    for own in asked.values():
        found[own.column][own.form].append(own.examples)
    return {
        column: {form: np.concatenate(parts) for form, parts in own.items()} for column, own in found.items()
    }


def _values(need: Need, items: Tensor, asked: _Asked, examples: IntArray) -> Values:
    if not isinstance(need, Read) or asked.form is None or need.positions.is_all:
        return Values(items, examples, asked.place)
    counts, place = asked.counts, asked.place
    if asked.form.positions != need.positions or asked.form.heads != need.heads:
        selected = Read(need.origin, need.site, need.positions, need.heads)
        items = gather(need.site, by_token(need.site, items), place, selected, examples)
        counts, place = need.positions.counts(examples, 0), np.arange(len(examples))
    return Values(items, examples, place, np.concatenate([[0], np.cumsum(counts)]))
