"""Time of an experiment over the floor of its own plan: what its blocks would take as plain forwards.

The floor counts whole blocks. Beside it stands what is left of them once the plan has taken off the work that
rows share inside a block and the tokens that nobody reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vit_mechinterp as vmi
from benchmarks.measure import Spread, interleaved, seconds
from benchmarks.models import images
from benchmarks.plain import Plain, agree, effective, tell_apart
from benchmarks.report import Report, Row

__all__ = ["PLANNING", "TARGET", "over_floor"]

TARGET, PLANNING = 1.05, 0.01


@torch.no_grad()
def over_floor(
    report: Report,
    name: str,
    vit: vmi.HookedViT,
    runs: Sequence[vmi.Run],
    data: Mapping[str, Tensor],
    chosen: Any,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    checked: int = 16,
    target: float | None = TARGET,
) -> None:
    """Check some runs against plain hooks, time all of them, and add the row.

    The unit is one plain native forward of ``chosen.unit_images`` images; the floor is the plan's forwards
    times that time per image.

    Args:
        checked: how many runs, drawn at random, are compared with plain hooks; all if there are fewer.
    """
    plan = vmi.plan(vit, runs, data, tensors)
    results = vmi.execute(vit, runs, data, tensors=tensors, progress=False)
    plain = Plain(vit.module, data, tensors)
    n_runs, n_examples = results.logits.shape[:2]
    sample = np.random.default_rng(0).permutation(n_runs)[:checked]
    worst = 0.0
    outputs = []
    clean = plain.clean(runs[0].base)
    scale = clean.abs().max().item()
    for index in sample:
        outputs.append(plain.run(runs[index].model_dump(mode="json")))
        found = results.logits[int(index)]
        difference = agree(runs[index].name, found, outputs[-1], chosen.tolerance, scale)
        worst = max(worst, difference)
    moved = effective(outputs, clean, 1e-3)
    assert moved >= len(sample) // 2, f"only {moved} of {len(sample)} runs had an effect to speak of"
    tell_apart(name, results.logits[torch.as_tensor(sample)], torch.stack(outputs), clean)
    unit_images = images(vit.module, chosen.unit_images, 7)
    timed = interleaved(
        {name: lambda: vmi.execute(vit, runs, data, tensors=tensors, progress=False)},
        lambda: vit.module(unit_images),
        chosen.repeats,
        chosen.torch_device,
        units_around=5,
    )[name]
    floor = plan.forwards / chosen.unit_images
    fields = {"unit": "of the floor", "target": target}
    report.rows.append(
        Row.timed(
            name,
            timed,
            rows=n_runs * n_examples,
            unit_images=chosen.unit_images,
            scale=1 / floor,
            **fields,
        )
    )
    left = (plan.block_evaluations - plan.spared - plan.unread) / plan.block_evaluations
    over_left = Row.timed(f"{name}, over what is left", timed, scale=1 / (floor * left), unit="of the work")
    report.rows.append(over_left)
    planned = [seconds(lambda: vmi.plan(vit, runs, data, tensors), chosen.torch_device) for _ in range(3)]
    share = Spread.of([s / Spread.of(timed.seconds).median for s in planned])
    report.rows.append(Row(f"{name}, planning", share, "of the time", target=PLANNING))
    report.note(
        f"{name}: {n_runs} runs x {n_examples} examples; {plan.forwards:.5g} forwards' worth of blocks "
        f"instead of {plan.naive_forwards:.5g}, of which rows share {plan.spared / vit.layout.n_layers:.4g} "
        f"and nobody reads {plan.unread / vit.layout.n_layers:.4g}; {plan.launches} launches of at most "
        f"{plan.widest} rows. "
        f"{len(sample)} runs drawn at random agree with plain hooks to {worst:.1g} of the output's scale; "
        f"{moved} of them have an effect above 1e-3 of it."
    )
