"""The work of an experiment, chunk by chunk; where memory runs out, in forwards of half as many rows."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace

from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.forwards.chunk import Setting, chunk_of
from vit_mechinterp.engine.forwards.clean import Tick
from vit_mechinterp.engine.forwards.exhaustion import make_room
from vit_mechinterp.engine.inputs.ahead import Request
from vit_mechinterp.engine.results.collect import Gathering
from vit_mechinterp.engine.results.resume import FinishedChunks
from vit_mechinterp.engine.scheduling.budget import FREED, WAITING
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.model.heap import GivingBack, give_back
from vit_mechinterp.model.out_of_memory import memory_may_run_out

__all__ = ["Work"]


class Work:
    """Carries out a schedule.

    Args:
        setting: the model, the data, and what else all chunks have.
        schedule: what is to be computed.
        kept: where finished chunks go, and where those are that need not be computed; None keeps them here.
        budget: bytes to hold at most; None if none was given.

    Attributes:
        collected: what the chunks gave that are kept here.
        halvings: how often memory ran out.
    """

    def __init__(
        self, setting: Setting, schedule: Schedule, kept: FinishedChunks | None, budget: int | None
    ) -> None:
        self.setting, self.kept = setting, kept
        self.data, self.clean = setting.data, setting.clean
        self._is_thrifty = budget is not None
        self._most_ahead: int | None = None
        if budget is not None:
            self._most_ahead = budget // WAITING
            self.setting = replace(setting, tick=_thrifty_tick(setting.tick, GivingBack(budget // FREED)))
        self.schedule = schedule if kept is None else replace(schedule, width=kept.width())
        self.collected = Gathering(schedule.bound, schedule.n_examples)
        self.halvings = 0
        self._waiting = [chunk for chunk in schedule.chunks if kept is None or not kept.has(chunk)]

    def carry_out(self) -> None:
        """Compute all chunks that are not finished."""
        means = self._means()
        while self._waiting:
            with (
                memory_may_run_out(),
                self.data.ahead(self._requests(self._waiting), self._most_ahead),
                closing(self._next()) as chunks,
            ):
                for chunk in chunks:
                    self._finish(chunk, means)
            # Out here a failed forward's frames are gone, and its memory with them.
            if self._waiting:
                self._halve(self.schedule.widest(self._waiting[0]))

    def _means(self) -> Mapping[Read, Tensor]:
        """The dataset means, if they come first; computed by us or, where others work here too, by them."""
        if not (self._waiting and self.schedule.needs.means_come_first):
            self.clean.expect(self.schedule, self._waiting, means=False)
            return {}
        with nullcontext() if self.kept is None else self.kept.computing_means() as known:
            self.clean.expect(self.schedule, self._waiting, means=known is None)
            device = self.setting.vit.device  # what was read from a file is on the CPU
            means = None if known is None else {read: mean.to(device) for read, mean in known.items()}
            while means is None:
                batches = self._requests(self.schedule.chunks, self.schedule.reads.means)
                with memory_may_run_out(), self.data.ahead(batches, self._most_ahead):
                    means = self.clean.means(self.setting.vit, self.data, self.schedule, self.setting.tick)
                if means is None:
                    most = self.schedule.n_examples if self.schedule.holds else self.schedule.chunk
                    self._halve(min(self.schedule.clean_width, most))
                elif self.kept is not None:
                    self.kept.add_means(means)
        return means

    def _finish(self, chunk: range, means: Mapping[Read, Tensor]) -> None:
        """Compute one chunk, and keep what it gives."""
        part = chunk_of(self.setting, self.schedule, chunk, means, self._earlier)
        if self.kept is None:
            self.collected.add(chunk, part)
        else:
            self.kept.add(chunk, part, self.schedule.width, self.halvings)
        del part  # or it would be held while memory is given back
        if self._is_thrifty:
            give_back()

    def _earlier(self, run: str, examples: IntArray) -> Tensor:
        """Outputs of a run for some examples of finished chunks."""
        finished = self.collected if self.kept is None else self.kept
        return finished.outputs_of(run, examples)

    def _next(self) -> Generator[range, None, None]:
        """The first chunk that waits, again and again; each is left out once the next is asked for."""
        if self.kept is not None:
            yield from self.kept.next_of(self._waiting)
            return
        while self._waiting:
            yield self._waiting[0]
            self._waiting.pop(0)

    def _requests(self, chunks: Sequence[range], reads: Sequence[Read] | None = None) -> Iterator[Request]:
        """The batches of images that some chunks will ask for."""
        return self.clean.requests(self.schedule, list(chunks), reads)

    def _halve(self, rows: int) -> None:
        self.schedule = replace(self.schedule, width=make_room(rows))
        self.halvings += 1


def _thrifty_tick(tick: Tick, giving_back: GivingBack) -> Tick:
    """The same, which also returns freed memory: it is called where a forward's own is free."""

    def both(n: int) -> None:
        tick(n)
        giving_back()

    return both
