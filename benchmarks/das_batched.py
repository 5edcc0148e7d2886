"""Subspaces of several layers and seeds trained at once against one at a time: part of `das_training`.

Both are the circuit's own training. At once, the trainings share clean forwards, growing batches, the
orthogonal map and the optimizer; one at a time, each has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import vit_mechinterp as vmi
from benchmarks.measure import Spread, interleaved
from benchmarks.report import Report, Row
from vit_mechinterp.circuits.alignment import Training
from vit_mechinterp.circuits.das import interchange_run
from vit_mechinterp.circuits.subspace_training import Search, train_subspaces

__all__ = ["against_one_at_a_time", "bound"]

EPOCHS, SEEDS = 2, (0, 1, 2)


def bound(layers: Sequence[int], n_layers: int, seeds: int, epochs: int) -> float:
    """How many times as fast the arithmetic allows: blocks for each example, backward counted as one forward.

    Source and base images pass through the blocks up to a layer: for every training, or once for all.
    """
    steps = seeds * epochs * sum(2 * (n_layers - 1 - layer) for layer in layers)
    apart = seeds * sum(2 * (layer + 1) for layer in layers)
    return (apart + steps) / (2 * (max(layers) + 1) + steps)


def against_one_at_a_time(
    report: Report, module: Any, data: dict[str, Tensor], chosen: Any, close: Callable[..., float]
) -> None:
    """Whole trainings, clean forwards included, in turn."""
    vit = vmi.wrap(module)
    every = sorted(chosen.layers)
    layers = sorted({every[0], every[len(every) // 2], every[-1]})
    training = Training(epochs=EPOCHS, batch_size=chosen.batch)
    cases = [(layer, seed) for seed in SEEDS for layer in layers]
    losses: dict[str, list[float]] = {}

    def search(seed: int, layers: Sequence[int]) -> Search:
        prefix = f"seed_{seed}."
        runs = {}
        for layer in layers:
            run = interchange_run(
                layer, "resid_post", {"column": "edited"}, {"column": "source_tokens"}, prefix=prefix
            )  # fmt: skip
            runs[layer] = run.model_copy(update={"name": prefix + run.name})
        return Search(runs, data, data["label"].cpu(), seed, prefix)

    def train(*searches: Search) -> list[float]:
        found = train_subspaces(vit, searches, vit.layout.d_model, training, progress=False)
        return [loss for own in found for loss in own.losses.values()]

    def together() -> None:
        losses["together"] = train(*(search(seed, layers) for seed in SEEDS))

    def apart() -> None:
        losses["apart"] = [loss for layer, seed in cases for loss in train(search(seed, [layer]))]

    together()
    apart()
    name = f"{len(layers)} layers x {len(SEEDS)} seeds"
    together_, apart_ = (torch.tensor(losses[way]) for way in ("together", "apart"))
    worst = close(name, together_, apart_, chosen.torch_dtype)
    assert together_.std() > 10 * worst * together_.mean(), f"{name}: all trainings are alike"
    timed = interleaved(
        {"together": together, "apart": apart},
        lambda: module(data["base"]),
        max(2, chosen.repeats // 2),
        chosen.torch_device,
        units_around=1,
    )
    ratios = [b / a for a, b in zip(timed["together"].units, timed["apart"].units, strict=True)]
    seconds = Spread.of(timed["together"].seconds).median
    report.rows.append(
        Row(
            f"{name} at once, against one training at a time", Spread.of(ratios), "times as fast",
            bound=bound(layers, vit.layout.n_layers, len(SEEDS), EPOCHS), seconds=seconds,
            interventions=len(cases) * EPOCHS * len(data["label"]) / seconds,
        )
    )  # fmt: skip
    report.note(
        f"{name}: whole trainings of {EPOCHS} epochs by the circuit itself, clean forwards included; losses "
        f"of the last epoch agree to {worst:.1g}. The bound counts blocks: clean forwards are shared, steps "
        "are not."
    )
