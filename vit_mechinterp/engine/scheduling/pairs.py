"""How many (row, block) pairs a schedule computes."""

from __future__ import annotations

from collections.abc import Iterable

from vit_mechinterp.engine.scheduling.clean_groups import CleanGroup
from vit_mechinterp.engine.scheduling.schedule import Schedule

__all__ = ["pairs_of"]


def pairs_of(schedule: Schedule) -> int:
    """Pairs of all chunks, those of clean forwards included."""
    total = _of_batches(schedule.common_batches) if schedule.holds else 0
    known: dict[int, int] = {}
    for chunk in schedule.chunks:
        if not schedule.reads.is_regular or len(chunk) not in known:
            known[len(chunk)] = _of_chunk(schedule, chunk)
        total += known[len(chunk)]
    return total


def _of_chunk(schedule: Schedule, chunk: range) -> int:
    total = _of_batches(schedule.clean_batches(schedule.own_needs(chunk)))
    if schedule.needs.means_come_first and not schedule.holds:
        total += _of_batches(schedule.clean_batches(schedule.own_needs(chunk, schedule.reads.means)))
    parts = (part for own in schedule.rows.of(chunk).parts for part in own)
    return total + sum(len(part.examples) * part.run.passes for part in parts)


def _of_batches(batches: Iterable[CleanGroup]) -> int:
    return sum(len(batch.images) * batch.stop.blocks for batch in batches)
