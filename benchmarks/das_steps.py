"""Trainings of subspaces with ours and with another way of getting logits: compared, then timed step by step.

They are compared twice, because a training amplifies rounding: Adam divides small gradients by their own
size, so in float32 two ways that only sum in another order part within a dozen steps. In float64, where
rounding has no time to grow, whole curves and what was learned have to agree, on a few examples a step; in
the dtype that is timed, and at its size, the first steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vit_mechinterp as vmi
from benchmarks.das_ways import Forward, Trainer, prepared_forward
from benchmarks.measure import seconds
from benchmarks.models import build, pairs
from benchmarks.report import Report

__all__ = ["FEW", "SHARE", "Make", "Steps", "Subject", "apart", "check", "step_by_step"]

SHARE = 1e-5
"""How far losses may be apart, as a share of each, and subspaces, as a share of the largest entry."""

FEW, FIRST = 4, 3
"""Examples of a step in float64, and steps that are compared in the dtype that is timed."""

Make = Callable[[Any, Sequence[int], Mapping[str, Tensor]], Forward]
"""Model, layers and pairs -> how the other way gets its logits."""


@dataclass(frozen=True)
class Subject:
    """A frozen model, a copy of it for the other way, and pairs to train on, ``batch`` in a step."""

    vit: vmi.HookedViT
    other: Any
    data: dict[str, Tensor]
    batch: int

    @classmethod
    def of(cls, chosen: Any, *, exact: bool = False) -> Subject:
        """As the options say, or in float64 with few examples."""
        dtype = torch.float64 if exact else chosen.torch_dtype
        module: Any = build(chosen.model, device=chosen.device, dtype=dtype)
        module.requires_grad_(False)
        examples = min(chosen.examples, 2 * FEW) if exact else chosen.examples
        batch = min(chosen.batch, FEW) if exact else chosen.batch
        return cls(vmi.wrap(module), copy.deepcopy(module), pairs(module, examples), batch)


@dataclass(frozen=True)
class Steps:
    """Seconds of every step of both ways, and of the units between them; the first step is left out."""

    ours: list[float]
    other: list[float]
    units: list[float]

    @property
    def times_as_fast(self) -> list[float]:
        """Seconds of the other over seconds of ours, step by step."""
        return [b / a for a, b in zip(self.ours, self.other, strict=True)]


def apart(name: str, found: Tensor, wanted: Tensor, share: float) -> float:
    """Assert that losses are the same to a share of each; the largest relative difference."""
    difference = ((found - wanted).abs() / wanted.abs()).max().item()
    assert difference <= share, f"{name}: learning curves differ by {difference:.2g}, more than {share:g}"
    return difference


@contextmanager
def _both(subject: Subject, layers: Sequence[int], make: Make) -> Iterator[tuple[Trainer, Trainer]]:
    d, data = subject.vit.layout.d_model, subject.data
    theirs = make(subject.other, layers, data)
    with prepared_forward(subject.vit, layers, data) as mine:
        yield Trainer(mine, layers, d, data, subject.batch), Trainer(theirs, layers, d, data, subject.batch)


def check(
    report: Report, name: str, subject: Subject, layers: Sequence[int], make: Make, chosen: Any
) -> None:
    """Assert that both ways learn the same, and that they learn something."""
    steps = chosen.repeats + 1
    with _both(Subject.of(chosen, exact=True), layers, make) as (mine, theirs):
        before = theirs.subspaces()
        ours = torch.stack([mine.step() for _ in range(steps)])
        other = torch.stack([theirs.step() for _ in range(steps)])
        worst = apart(f"{name}, float64", ours, other, SHARE)
        learned = theirs.subspaces()
        scale = learned.abs().max()
        between = ((mine.subspaces() - learned).abs().max() / scale).item()
        moved = ((learned - before).abs().max() / scale).item()
    assert between <= SHARE, f"{name}, float64: learned subspaces differ by {between:.2g} of their scale"
    assert moved > 100 * SHARE, (
        f"{name}: the training moved no subspace by more than {moved:.2g} of its scale"
    )
    report.curves[name] = {"ours": ours.tolist(), "other": other.tolist()}
    with _both(subject, layers, make) as (mine, theirs):
        first = [(mine.step(), theirs.step()) for _ in range(min(steps, FIRST))]
    found, wanted = (torch.stack(curve) for curve in zip(*first, strict=True))
    early = apart(f"{name}, the first {len(first)} steps", found, wanted, chosen.tolerance)
    report.note(
        f"{name}: in float64, learning curves of {steps} steps agree to {worst:.1g} and the learned "
        f"subspaces, which move by {moved:.1g} of their scale, to {between:.1g}; in {chosen.dtype}, the "
        f"first {len(first)} steps to {early:.1g}."
    )


def step_by_step(subject: Subject, layers: Sequence[int], make: Make, chosen: Any) -> Steps:
    """Take the steps of both in turn; the first one only warms up."""
    images = subject.data["base"][: subject.batch]
    times: dict[str, list[float]] = {"ours": [], "other": []}
    units: list[float] = []
    with _both(subject, layers, make) as both:
        for step in range(chosen.repeats + 1):
            around = []
            ways = list(zip(times, both, strict=True))
            for name, trainer in ways if step % 2 else ways[::-1]:
                with torch.no_grad():
                    around.append(seconds(lambda: subject.other(images), chosen.torch_device))
                times[name].append(seconds(trainer.step, chosen.torch_device))
            units.append(float(np.mean(around)))
    return Steps(times["ours"][1:], times["other"][1:], units[1:])
