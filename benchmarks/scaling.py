"""Time against the number of runs, examples and layers, up to 100,000 rows, and the share of planning in it.

Growth is the exponent of time against block evaluations, fitted to the larger half of each series: 1 is
linear. On ``--model micro``, whose blocks take a few microseconds a row, what is not arithmetic shows most.
Any model can be measured: the series over runs and over examples on ``--layers`` of its blocks, or all of
them, the series over layers on models of its width with as many blocks as ``--depths`` says.

    python -m benchmarks.scaling --rows 100000
    python -m benchmarks.scaling --device cuda --model vit_base
    python -m benchmarks.scaling --model vit_small --layers 12 --rows 2000 --depths 3 6 12
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import vit_mechinterp as vmi
from benchmarks import options
from benchmarks.measure import Spread, seconds
from benchmarks.models import SIZES, Geometry, build, pairs
from benchmarks.plain import Plain, agree
from benchmarks.report import Report, Row

DEPTHS = (2, 4, 8, 16, 32)
PRESETS: options.Presets = {
    "full": {"model": "vit_cifar", "repeats": 1, "depths": DEPTHS},
    "cuda": {"model": "vit_base", "depths": (3, 6, 12, 24)},
    "small": {"model": "micro", "repeats": 2, "depths": DEPTHS},
    "micro": {"model": "micro", "repeats": 1, "depths": DEPTHS},
}
ROWS = {"full": 100_000, "small": 10_000, "micro": 200}
"""Rows of the largest size, on the preset's own model or on a GPU."""

MADE, LAYERS = ("micro", "vit_cifar"), 4
"""Models that are there to be scaled, of which so many blocks are taken; of others, all."""

FEWEST = 50
"""A series ends with at least so many runs or examples."""

LINEAR, PLANNING = 1.05, 0.01
"""The largest exponent and share of planning that count as linear and negligible."""


def sizes(
    rows: int,
    layers: int = LAYERS,
    depths: Sequence[int] = DEPTHS,
    runs: int | None = None,
    examples: int | None = None,
) -> dict[str, list[tuple[int, int, int]]]:
    """``(runs, examples, layers)`` of each series; the largest has ``rows`` rows, or as many blocks to run in
    as many layers as there are then.

    Args:
        rows: (run, example) rows of the largest size.
        layers: blocks of the model in the series over runs and over examples.
        depths: blocks of the models in the series over layers.
        runs: in the series over examples; a quarter of the root of ``rows`` if left out.
        examples: in the series over runs and over layers; as many if left out.
    """
    few = max(2, round(rows**0.5 / 4))
    runs, examples = runs or few, examples or few

    def grown(other: int) -> list[int]:
        shares = (10, 20, 50, 100, 200, 500, 1000)
        return list(dict.fromkeys(max(2, rows * share // (1000 * other)) for share in shares))

    # With L layers, rows of edits at all block outputs pass through (L - 1) / 2 blocks each.
    deepest = max(depths)
    per_layer = max(2, round(rows * (layers - 1) / (deepest - 1) / (deepest * examples)))
    return {
        "runs": [(n, examples, layers) for n in grown(examples)],
        "examples": [(runs, n, layers) for n in grown(runs)],
        "layers": [(per_layer * depth, examples, depth) for depth in sorted(depths)],
    }


def work(geometry: Geometry, layers: int) -> float:
    """Multiplications that a row of the experiment takes, the blocks before its edit left out."""
    g, tokens = geometry, geometry.patches + 1
    return (layers - 1) / 2 * tokens * (4 * g.width**2 + 2 * g.width * g.mlp + 2 * tokens * g.width)


def affordable(chosen: Any) -> int:
    """Rows of the largest size where none are given: on a CPU, as many as take the preset's own model as much
    arithmetic."""
    rows, own = ROWS[chosen.scale], PRESETS[chosen.scale]["model"]
    if chosen.torch_device.type == "cuda" and chosen.scale == "full":
        return rows
    share = work(SIZES[own], LAYERS) / work(SIZES[chosen.model], chosen.layers)
    return round(rows * min(1, share))


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


def _settle_rows(parser: argparse.ArgumentParser, chosen: Any) -> None:
    """Find the number of rows if it is not given, and refuse sizes of which no series can be made."""
    if chosen.layers < 2 or min(chosen.depths) < 2:
        parser.error("--layers and --depths must be 2 or more: edits behind the only block reach nothing.")
    if len(set(chosen.depths)) < 3:
        parser.error(
            f"--depths must name three or more sizes to fit growth to, not {len(set(chosen.depths))}."
        )
    fewest = FEWEST * max(4, chosen.runs or 0, chosen.examples or 0)
    if chosen.rows is None:
        chosen.rows = max(fewest, affordable(chosen))
    if chosen.rows < fewest:
        parser.error(
            f"--rows {chosen.rows} are too few for a series with these runs and examples; give {fewest} or "
            "more, or lower --runs or --examples."
        )


@torch.no_grad()
def point(shape: tuple[int, int, int], chosen: Any) -> dict[str, float]:
    """One size: seconds of `execute` and of `plan`, and block evaluations."""
    n_runs, n_examples, n_layers = shape
    geometry = dataclasses.replace(SIZES[chosen.model], layers=n_layers)
    module: Any = build(geometry, device=chosen.device, dtype=chosen.torch_dtype)
    vit = vmi.wrap(module)
    data = pairs(module, n_examples)
    runs = experiment(vit, n_runs)
    tensors = {"direction": torch.randn(geometry.width, generator=torch.Generator().manual_seed(3))}
    plan = vmi.plan(vit, runs, data, tensors)

    def execute() -> vmi.Results:
        return vmi.execute(vit, runs, data, tensors=tensors, progress=False)

    results = execute()
    plain = Plain(module, {name: column[:4] for name, column in data.items()}, tensors)
    for n in {0, n_runs // 2, n_runs - 1}:
        wanted = plain.run(runs[n].model_dump(mode="json"))
        agree(runs[n].name, results.logits[n, :4], wanted, chosen.tolerance)
        assert not torch.equal(wanted, plain.clean("base"))
    device = chosen.torch_device
    executed = [seconds(execute, device) for _ in range(chosen.repeats)]
    planned = [seconds(lambda: vmi.plan(vit, runs, data, tensors), device) for _ in range(chosen.repeats)]
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
    parser.add_argument("--runs", type=int, help="runs in the series over examples")
    parser.add_argument("--layers", type=int, help="blocks of the model where something else grows")
    parser.add_argument(
        "--depths", type=int, nargs="+", help="blocks of the models in the series over layers"
    )
    chosen = options.parse(parser, PRESETS, argv)
    if chosen.layers is None:
        chosen.layers = LAYERS if chosen.model in MADE else SIZES[chosen.model].layers
    _settle_rows(parser, chosen)
    report = Report("scaling", f"Scaling, {chosen.model}", chosen)
    report.sizes |= {name: getattr(chosen, name) for name in ("rows", "layers", "depths")}
    point((2, 2, 2), chosen)  # what only the first call pays for
    for series, shapes in sizes(
        chosen.rows, chosen.layers, chosen.depths, chosen.runs, chosen.examples
    ).items():
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
        "Planning is the time of vmi.plan, which binds runs, looks at the data and counts; its share is "
        "smaller by as much as a model is slower."
    )
    report.finish()
    return report


if __name__ == "__main__":
    main()
