"""Time against the number of runs, examples and layers, up to 100,000 rows, and the share of planning in it.

Growth is the exponent of time against block evaluations, fitted to the larger half of each series: 1 is
linear. On ``--model micro``, whose blocks take a few microseconds a row, what is not arithmetic shows most.

    python -m benchmarks.scaling --rows 100000
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

import vit_mechinterp as vmi
from benchmarks import options
from benchmarks.measure import Spread, seconds
from benchmarks.models import SIZES, build, pairs
from benchmarks.plain import Plain, agree
from benchmarks.report import Report, Row

PRESETS = {
    "full": {"model": "vit_cifar", "repeats": 1, "rows": 100_000},
    "small": {"model": "micro", "repeats": 2, "rows": 10_000},
    "micro": {"model": "micro", "repeats": 1, "rows": 200},
}
LINEAR, PLANNING = 1.05, 0.01
"""The largest exponent and share of planning that count as linear and negligible."""


def sizes(rows: int) -> dict[str, list[tuple[int, int, int]]]:
    """``(runs, examples, layers)`` of each series; the largest has ``rows`` rows, or as many blocks to run in
    as many layers as there are then."""
    few = max(2, round(rows**0.5 / 4))
    grown = [max(2, rows * s // (1000 * few)) for s in (10, 20, 50, 100, 200, 500, 1000)]
    # With L layers, rows of edits at all block outputs pass through (L - 1) / 2 blocks each.
    per_layer = max(2, round(rows * 3 / 31 / (32 * few)))
    return {
        "runs": [(n, few, 4) for n in dict.fromkeys(grown)],
        "examples": [(few, n, 4) for n in dict.fromkeys(grown)],
        "layers": [(per_layer * layers, few, layers) for layers in (2, 4, 8, 16, 32)],
    }


def experiment(vit: vmi.HookedViT, n_runs: int) -> list[vmi.Run]:
    """A direction added at a patch and the class token, at block outputs in turn; no two runs are the
    same."""
    n_layers, n_patches = vit.layout.n_layers, vit.layout.tokens.n_patches
    return [
        vmi.Run(
            name=f"run{n}",
            interventions=[
                vmi.AddDirection(
                    site=f"blocks.{n % n_layers}.resid_post",
                    tokens=["cls", n // n_layers % n_patches],
                    vector=vmi.TensorRef("direction"),
                    alpha=1 + n / n_runs,
                )
            ],
        )
        for n in range(n_runs)
    ]


@torch.no_grad()
def point(shape: tuple[int, int, int], chosen: Any) -> dict[str, float]:
    """One size: seconds of `execute` and of `plan`, and block evaluations."""
    n_runs, n_examples, n_layers = shape
    geometry = dataclasses.replace(SIZES[chosen.model], layers=n_layers)
    module: Any = build(geometry, device=chosen.device, dtype=chosen.torch_dtype)
    vit = vmi.wrap(module)
    data = pairs(module, n_examples)
    runs = experiment(vit, n_runs)
    plan = vmi.plan(vit, runs, data)
    tensors = {"direction": torch.randn(geometry.width, generator=torch.Generator().manual_seed(3))}

    def work() -> vmi.Results:
        return vmi.execute(vit, runs, data, tensors=tensors, progress=False)

    results = work()
    plain = Plain(module, {name: column[:4] for name, column in data.items()}, tensors)
    for n in {0, n_runs // 2, n_runs - 1}:
        wanted = plain.run(runs[n].model_dump(mode="json"))
        agree(runs[n].name, results.logits[n, :4], wanted, chosen.tolerance)
        assert not torch.equal(wanted, plain.clean("base"))
    device = chosen.torch_device
    executed = [seconds(work, device) for _ in range(chosen.repeats)]
    planned = [seconds(lambda: vmi.plan(vit, runs, data), device) for _ in range(chosen.repeats)]
    taken = float(np.median(executed))
    return {
        "runs": n_runs,
        "examples": n_examples,
        "layers": n_layers,
        "rows": n_runs * n_examples,
        "block_evaluations": plan.block_evaluations,
        "seconds": taken,
        "planning": float(np.median(planned)) / taken,
    }


def main(argv: list[str] | None = None) -> Report:
    """Measure the three series."""
    parser = options.add(__doc__ or "")
    parser.add_argument("--rows", type=int, help="(run, example) rows of the largest size")
    chosen = options.parse(parser, PRESETS, argv)
    report = Report("scaling", f"Scaling, {chosen.model}", chosen)
    point((2, 2, 2), chosen)  # what only the first call pays for
    for series, shapes in sizes(chosen.rows).items():
        points = [point(shape, chosen) for shape in shapes]
        report.curves[series] = points
        half = points[len(points) // 2 - 1 :]
        x, y = (np.log([p[key] for p in half]) for key in ("block_evaluations", "seconds"))
        exponent = float(np.polyfit(x, y, 1)[0])
        last = points[-1]
        rows = f"{last['rows']:,.0f} rows"
        report.rows.append(
            Row(
                f"growth with {series}, to {rows}", Spread.of([exponent]), "exponent", target=LINEAR,
                seconds=last["seconds"], interventions=last["rows"] / last["seconds"],
            )
        )  # fmt: skip
        report.rows.append(
            Row(f"planning, {series}, {rows}", Spread.of([last["planning"]]), "of the time", target=PLANNING)
        )
        report.note(
            f"{series}: "
            + "; ".join(
                f"{p['runs']:.0f} runs x {p['examples']:.0f} examples, {p['layers']:.0f} layers: "
                f"{p['seconds']:.3g} s, {1e6 * p['seconds'] / p['block_evaluations']:.3g} us a block "
                f"evaluation, planning {p['planning']:.2%}"
                for p in points
            )
        )
    report.note(
        "Growth is the exponent of seconds against block evaluations over the larger half of a series. "
        "Planning is the time of vmi.plan, which binds runs, looks at the data and counts; with a real "
        "model its share is smaller by as much as the model is slower than this one."
    )
    report.finish()
    return report


if __name__ == "__main__":
    main()
