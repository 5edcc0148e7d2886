"""Timing: every way interleaved with its unit in one process, so that both see the same machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

__all__ = ["Spread", "Timed", "interleaved", "peak_bytes", "seconds"]

Work = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles and a 95 % bootstrap interval.

    Attributes:
        median: of the repeats.
        q1, q3: quartiles; their difference is the interquartile range.
        low, high: 95 % interval of the median, from 2,000 resamples of the repeats.
        n: number of repeats.
    """

    median: float
    q1: float
    q3: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of some repeats."""
        x = np.asarray(values)
        draws = np.random.default_rng(0).choice(x, size=(2000, len(x)))
        low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
        q1, median, q3 = np.percentile(x, [25, 50, 75])
        return cls(float(median), float(q1), float(q3), float(low), float(high), len(x))


@dataclass
class Timed:
    """Repeats of one way: its seconds, and the seconds of one unit around each repeat.

    ``peak_bytes`` is the most that the CUDA allocator held during the way, model included; None on a CPU.
    """

    seconds: list[float] = field(default_factory=list)
    unit_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def units(self) -> list[float]:
        """Each repeat as a multiple of the unit measured around it."""
        return [way / unit for way, unit in zip(self.seconds, self.unit_seconds, strict=True)]

    @property
    def spread(self) -> Spread:
        """The spread of ``units``."""
        return Spread.of(self.units)


def seconds(work: Work, device: torch.device) -> float:
    """Wall time of one call, with the device idle before and behind it."""
    _synchronize(device)
    begin = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - begin


def peak_bytes(work: Work, device: torch.device) -> tuple[float, int | None]:
    """Seconds of one call, and the most bytes the CUDA allocator held during it (None on a CPU)."""
    if device.type != "cuda":
        return seconds(work, device), None
    torch.cuda.reset_peak_memory_stats(device)
    taken = seconds(work, device)
    return taken, torch.cuda.max_memory_allocated(device)


def interleaved(
    ways: Mapping[str, Work], unit: Work, repeats: int, device: torch.device, *, units_around: int = 2
) -> dict[str, Timed]:
    """Time each way several times, with the unit before and behind every repeat.

    The order of the ways turns, and every other time it is backwards, so that none always gains from what the
    same one left in memory before it. Call each way once beforehand (checking that all agree does so),
    because the first call pays for what later ones find prepared.

    Args:
        ways: what to time, by name.
        unit: what counts as one.
        repeats: number of rounds.
        device: where the work is done; a GPU is synchronised around every call.
        units_around: calls of the unit on either side of a way; their mean is the repeat's unit.
    """
    timed = {name: Timed() for name in ways}
    names = list(ways)
    unit()
    for turn in range(repeats):
        first = turn // 2 % len(names)
        order = names[first:] + names[:first]
        for name in reversed(order) if turn % 2 else order:
            gc.collect()
            before = [seconds(unit, device) for _ in range(units_around)]
            taken, peak = peak_bytes(ways[name], device)
            behind = [seconds(unit, device) for _ in range(units_around)]
            timed[name].seconds.append(taken)
            timed[name].unit_seconds.append(float(np.mean(before + behind)))
            if peak is not None:
                timed[name].peak_bytes = max(peak, timed[name].peak_bytes or 0)
    return timed


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
