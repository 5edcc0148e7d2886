"""Clean forwards of an experiment through a store: read what is there, compute and keep what is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from vit_mechinterp.engine.ahead import Request
from vit_mechinterp.engine.clean import Clean
from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.positions import IntArray, Positions
from vit_mechinterp.engine.schedule import Schedule
from vit_mechinterp.engine.store.source import Source, Wanted, rows_by_default
from vit_mechinterp.engine.store.tiers import Tiers
from vit_mechinterp.engine.values import ColumnOrigin, Read, Values, by_token, gather
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["StoredClean"]

Needs = Mapping[Read | str, IntArray]
"""Reads, and image columns whose output is wanted, with their examples."""


class StoredClean:
    """Stands in for `clean_pass`, with the same values up to rounding, and the same bits in every experiment.

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
        for chunk in schedule.chunks:
            for column, wanted in _by_column(schedule, _needs(schedule, chunk, None)).items():
                reads[column].update(dict.fromkeys(wanted))
        for read in schedule.mean_reads if schedule.means_come_first else ():
            assert isinstance(read.origin, ColumnOrigin)
            reads[read.origin.column][_stored_form(read)] = None
        self.tiers = tiers
        self.sources: dict[str, Source] = {}
        for column, own in reads.items():
            rows = min(most, rows_by_default(vit))
            self.sources[column] = Source(tiers, vit, data, column, own, rows, model=model)
            if batch_size == "auto":
                self.sources[column].adopt_rows(most)

    @property
    def rows(self) -> dict[str, int]:
        """Images per clean forward, by image column."""
        return {column: source.rows for column, source in self.sources.items()}

    def use_rows(self, rows: Mapping[str, int]) -> None:
        """Change the images per clean forward, by image column."""
        for column, source in self.sources.items():
            if rows.get(column, source.rows) != source.rows:
                source.use_rows(rows[column])

    def requests(
        self, schedule: Schedule, chunks: Iterable[range], reads: Sequence[Read] | None = None
    ) -> Iterator[Request]:
        """The batches of images that will be asked for, in order."""
        seen: set[tuple[str, range]] = set()
        for chunk in chunks:
            for column, wanted in _by_column(schedule, _needs(schedule, chunk, reads)).items():
                for grain in self.sources[column].missing_grains(wanted):
                    if (column, grain) not in seen:
                        seen.add((column, grain))
                        yield column, tuple(grain)

    def values(self, schedule: Schedule, need: Read | str, examples: IntArray) -> Values:
        """One value of some ascending examples, read on its own (the output of a column by its name)."""
        form = None if isinstance(need, str) else _stored_form(need)
        source = self.sources[_column_of(need)]
        own = source.take({form: _places(schedule, need, examples)})[form]
        if isinstance(need, str):
            return Values(own, examples, np.arange(len(examples)))
        return _values(need, own, examples)

    def __call__(
        self,
        vit: HookedViT,
        data: Data,
        schedule: Schedule,
        chunk: range,
        reads: Sequence[Read] | None = None,
        tick: Callable[[int], None] = lambda n: None,
    ) -> Clean:
        """What `clean_pass` gives."""
        needs = _needs(schedule, chunk, reads)
        clean = Clean()
        for column, wanted in _by_column(schedule, needs).items():
            source = self.sources[column]
            source.tick = tick
            if source.rows > schedule.clean_width:  # memory ran out
                source.use_rows(schedule.clean_width)
            found = source.take(wanted)
            taken = dict.fromkeys(wanted, 0)
            for need, examples in needs.items():
                if _column_of(need) != column:
                    continue
                form = None if isinstance(need, str) else _stored_form(need)
                items = int(_counts(form, _places(schedule, need, examples)).sum())
                own = found[form][taken[form] : taken[form] + items]
                taken[form] += items
                if isinstance(need, str):
                    clean.outputs[need] = Values(own, examples, np.arange(len(examples)))
                else:
                    clean.values[need] = _values(need, own, examples)
        return clean


def _needs(schedule: Schedule, chunk: range, reads: Sequence[Read] | None) -> Needs:
    values, outputs = schedule.clean_needs(chunk, reads)
    needs: dict[Read | str, IntArray] = dict(values.items())
    needs.update(outputs.items())
    return needs


def _column_of(need: Read | str) -> str:
    if isinstance(need, str):
        return need
    assert isinstance(need.origin, ColumnOrigin)
    return need.origin.column


def _stored_form(read: Read) -> Read:
    """What is stored for a read: the column's own values, of tokens that belong to the image."""
    assert isinstance(read.origin, ColumnOrigin)
    own = ColumnOrigin(read.origin.column)
    if read.origin.permutation is not None and read.positions.each is not None:
        return Read(own, read.site)
    return Read(own, read.site, read.positions, read.heads)


def _places(schedule: Schedule, need: Read | str, examples: IntArray) -> IntArray:
    """The examples in whose place of the column the images stand."""
    if isinstance(need, str):
        return examples
    assert isinstance(need.origin, ColumnOrigin)
    return schedule.sharing.places_of(need.origin)[examples]


def _by_column(schedule: Schedule, needs: Needs) -> dict[str, dict[Wanted, IntArray]]:
    """What to take from every column: needs that are stored alike behind one another."""
    found: dict[str, dict[Wanted, list[IntArray]]] = defaultdict(lambda: defaultdict(list))
    for need, examples in needs.items():
        form = None if isinstance(need, str) else _stored_form(need)
        found[_column_of(need)][form].append(_places(schedule, need, examples))
    return {
        column: {form: np.concatenate(parts) for form, parts in own.items()} for column, own in found.items()
    }


def _counts(form: Wanted, examples: IntArray) -> IntArray:
    """Number of stored items of some examples."""
    if form is None or form.positions.is_all:
        return np.ones(len(examples), dtype=np.int64)
    return np.asarray(form.positions.counts(examples, 0))


def _values(read: Read, items: Tensor, examples: IntArray) -> Values:
    form = _stored_form(read)
    if form.positions != read.positions or form.heads != read.heads:
        selected = Read(read.origin, read.site, read.positions, read.heads)
        items = gather(read.site, by_token(read.site, items), slice(0, len(examples)), selected, examples)
    place = np.arange(len(examples))
    if read.positions == Positions():
        return Values(items, examples, place)
    return Values(
        items, examples, place, np.concatenate([[0], np.cumsum(read.positions.counts(examples, 0))])
    )
