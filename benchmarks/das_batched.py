"""Subspaces of several layers and seeds trained at once against one at a time: part of `das_training`.

Both are the circuit's own training. At once, the trainings share clean forwards, growing batches, the
orthogonal map and the optimizer; one at a time, each has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.das_steps import SHARE, Subject, apart
from benchmarks.measure import Spread, interleaved
from benchmarks.report import Report, Row
from vit_mechinterp.circuits.alignment import Training
from vit_mechinterp.circuits.das import interchange_run
from vit_mechinterp.circuits.subspace_training import Search, Trained, train_subspaces

__all__ = ["against_one_at_a_time", "bound"]

EPOCHS, SEEDS = 2, (0, 1, 2)


def bound(layers: Sequence[int], n_layers: int, seeds: int, epochs: int) -> float:
    """How many times as fast the arithmetic allows: blocks for each example, backward counted as one forward.

    Source and base images pass through the blocks up to a layer: for every training, or once for all.
    """
    steps = seeds * epochs * sum(2 * (n_layers - 1 - layer) for layer in layers)
    apart = seeds * sum(2 * (layer + 1) for layer in layers)
    return (apart + steps) / (2 * (max(layers) + 1) + steps)


class Trainings:
    """The trainings of some layers with every seed, on a subject's pairs."""

    def __init__(self, subject: Subject, layers: Sequence[int], epochs: int) -> None:
        self.vit, self.data, self.layers = subject.vit, subject.data, layers
        self.training = Training(epochs=epochs, batch_size=subject.batch)

    def together(self) -> list[Trained]:
        """All in the same growing batches."""
        return self._train([self._search(seed, self.layers) for seed in SEEDS])

    def one_at_a_time(self) -> list[Trained]:
        """Each by itself, in the same order."""
        cases = [(layer, seed) for seed in SEEDS for layer in self.layers]
        return [found for layer, seed in cases for found in self._train([self._search(seed, [layer])])]

    def losses(self) -> tuple[Tensor, Tensor]:
        """Mean losses of the last epoch of every training, both ways; what was learned has to be the same."""
        both = self.together(), self.one_at_a_time()
        learned = [{name: t for own in found for name, t in own.tensors.items()} for found in both]
        for name, tensor in learned[0].items() if self.data["base"].dtype == torch.float64 else ():
            between = (tensor - learned[1][name]).abs().max().item()
            assert between <= SHARE, f"{name}, float64: learned tensors differ by {between:.2g}"
        first, second = ([loss for own in found for loss in own.losses.values()] for found in both)
        return torch.tensor(first), torch.tensor(second)

    def _search(self, seed: int, layers: Sequence[int]) -> Search:
        prefix = f"seed_{seed}."
        runs = {}
        for layer in layers:
            run = interchange_run(
                layer, "resid_post", {"column": "edited"}, {"column": "source_tokens"}, prefix=prefix
            )
            runs[layer] = run.model_copy(update={"name": prefix + run.name})
        return Search(runs, self.data, self.data["label"].cpu(), seed, prefix)

    def _train(self, searches: Sequence[Search]) -> list[Trained]:
        return train_subspaces(self.vit, searches, self.vit.layout.d_model, self.training, progress=False)


def against_one_at_a_time(report: Report, subject: Subject, chosen: Any) -> None:
    """Whole trainings, clean forwards included, in turn."""
    every = sorted(chosen.layers)
    layers = sorted({every[0], every[len(every) // 2], every[-1]})
    name = f"{len(layers)} layers x {len(SEEDS)} seeds"
    found, wanted = Trainings(Subject.of(chosen, exact=True), layers, EPOCHS).losses()
    worst = apart(f"{name}, float64", found, wanted, SHARE)
    assert found.std() > 10 * SHARE * found.mean(), f"{name}: all trainings are alike"
    early = apart(f"{name}, one epoch", *Trainings(subject, layers, 1).losses(), chosen.tolerance)
    trainings = Trainings(subject, layers, EPOCHS)
    n_trainings = len(layers) * len(SEEDS)
    timed = interleaved(
        {"together": trainings.together, "apart": trainings.one_at_a_time},
        lambda: subject.vit.module(subject.data["base"]),
        max(2, chosen.repeats // 2),
        chosen.torch_device,
        units_around=1,
    )
    ratios = [b / a for a, b in zip(timed["together"].units, timed["apart"].units, strict=True)]
    seconds = Spread.of(timed["together"].seconds).median
    report.rows.append(
        Row(
            f"{name} at once, against one training at a time", Spread.of(ratios), "times as fast",
            bound=bound(layers, subject.vit.layout.n_layers, len(SEEDS), EPOCHS), seconds=seconds,
            interventions=n_trainings * EPOCHS * len(subject.data["label"]) / seconds,
        )
    )  # fmt: skip
    report.note(
        f"{name}: whole trainings of {EPOCHS} epochs by the circuit itself, clean forwards included. In "
        f"float64, mean losses of the last epoch agree to {worst:.1g} and the learned tensors to {SHARE:g}; "
        f"in {chosen.dtype}, losses of a training of one epoch to {early:.1g}. The bound counts blocks: "
        "clean forwards are shared, steps are not."
    )
