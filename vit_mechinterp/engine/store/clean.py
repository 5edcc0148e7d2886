"""Clean forwards of an experiment through a store: read what is there, compute and keep what is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import Need, Read, Values
from vit_mechinterp.engine.forwards.clean import Clean, CleanPass, Tick
from vit_mechinterp.engine.inputs.ahead import Request
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.store.arrangement import Arrangement, Asked, Forecast, with_fewer_forwards
from vit_mechinterp.engine.store.forward import Wanted
from vit_mechinterp.engine.store.homes import Homes
from vit_mechinterp.engine.store.source import Source
from vit_mechinterp.engine.store.tiers import Tiers
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["StoredClean"]


class StoredClean(CleanPass):
    """Reads clean values out of a store, or computes and keeps them: the same bits in every experiment.

    Args:
        tiers: the store's.
        vit: the model.
        data: the examples.
        schedule: the work.
        batch_size: most rows in one forward, as the experiment was given it.
    """

    def __init__(
        self,
        tiers: Tiers,
        vit: HookedViT,
        data: Data,
        schedule: Schedule,
        batch_size: int | Literal["auto"],
    ) -> None:
        self._sharing = schedule.sharing
        self._under = partial(Arrangement, tiers, vit, data, schedule, batch_size)
        self._arrangement = with_fewer_forwards(self._under, schedule)

    @property
    def decisions(self) -> dict[str, Any]:
        """What the bits of clean values depend on beside model and data: images per clean forward by column,
        and the columns that are kept under others."""
        return {"rows": self._arrangement.rows, "joined": dict(self._arrangement.homes.joined)}

    def decide(self, decisions: Mapping[str, Any]) -> None:
        """Go by other decisions."""
        if decisions["joined"] != self._arrangement.homes.joined:
            self._arrangement = self._under(Homes(self._sharing, decisions["joined"]))
        self._arrangement.use_rows(decisions["rows"])

    def expect(self, schedule: Schedule, chunks: Iterable[range], *, means: bool) -> None:
        """Be told which chunks will be asked for, and whether dataset means will be before: where the store
        can hold it until then, one forward gives all that any of them needs of an image."""
        for source, forms in self._arrangement.expected(schedule, chunks, means=means) or ():
            source.expect(forms)

    def forecast(self, schedule: Schedule) -> Forecast:
        """The clean forwards that a schedule needs, as the store is, if it loses nothing meanwhile."""
        return self._arrangement.forecast(schedule)

    def requests(
        self, schedule: Schedule, chunks: Iterable[range], reads: Sequence[Read] | None = None
    ) -> Iterator[Request]:
        """The batches of images that will be asked for, in order."""
        seen: set[Request] = set()
        for chunk in chunks:
            for column, own in self._by_column(schedule.needs.of(chunk, reads)).items():
                for batch in self._arrangement.sources[column].holdings.missing_batches(_wanted(own)):
                    if (column, batch) not in seen:
                        seen.add((column, batch))
                        yield column, batch

    def fill(self, schedule: Schedule, tick: Tick) -> None:
        """Compute and keep all that a schedule needs."""
        for column, asked in self._by_column(schedule.needs.of(range(schedule.n_examples))).items():
            source = self._arrangement.sources[column]
            with source.counting(tick):
                source.fill(_wanted(asked))

    def values(self, need: Need, examples: IntArray) -> Values:
        """One value of some ascending examples, read on its own."""
        (asked,) = self._arrangement.asked({need: examples})
        return _taken(self._arrangement.sources[asked.column], [asked])[need]

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
        clean = Clean()
        for column, asked in self._by_column(schedule.needs.of(chunk, reads)).items():
            source = self._arrangement.sources[column]
            if source.holdings.rows > schedule.clean_width:  # memory ran out
                source.holdings.use_rows(schedule.clean_width)
            with source.counting(tick):
                clean.values.update(_taken(source, asked))
        return clean

    def _by_column(self, needs: Mapping[Need, IntArray]) -> dict[str, list[Asked]]:
        found: dict[str, list[Asked]] = defaultdict(list)
        for asked in self._arrangement.asked(needs):
            found[asked.column].append(asked)
        return found


def _wanted(asked: Iterable[Asked]) -> dict[Wanted, IntArray]:
    """What to take of a column: needs that are stored alike behind one another."""
    found: dict[Wanted, list[IntArray]] = defaultdict(list)
    for own in asked:
        found[own.form].append(own.places)
    return {form: np.concatenate(parts) for form, parts in found.items()}


def _taken(source: Source, asked: Sequence[Asked]) -> dict[Need, Values]:
    """What is needed of a column; equal images are read once, where their values are stored once."""
    values: dict[Need, Values] = {}
    read_once: list[tuple[Asked, IntArray]] = []
    for own in asked:
        if not own.is_chosen:
            places, place = source.holdings.stored_once(own.form, own.places)
            read_once.append((replace(own, places=places), place))
    found = source.take(_wanted(own for own, _ in read_once))
    taken = dict.fromkeys(found, 0)
    for own, place in read_once:
        counts = _counts(own.form, own.places)
        begin, taken[own.form] = taken[own.form], taken[own.form] + int(counts.sum())
        is_whole = own.form is None or own.form.positions.is_all
        starts = None if is_whole else np.concatenate([[0], np.cumsum(counts)])
        values[own.need] = Values(found[own.form][begin : taken[own.form]], own.examples, place, starts)
    for own in asked:
        if own.is_chosen:
            assert isinstance(own.need, Read)
            pieces = list(source.chosen(own.need, own.places, own.examples))
            values[own.need] = Values.joined(own.need, pieces)
    return values


def _counts(form: Wanted, places: IntArray) -> IntArray:
    """Number of stored items at every place."""
    if form is None or form.positions.is_all:
        return np.ones(len(places), dtype=np.int64)
    return np.asarray(form.positions.counts(places, 0))
