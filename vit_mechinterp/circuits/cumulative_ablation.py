"""Cumulative ablation: how far the model gets as its heads are taken away one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vit_mechinterp.circuits.ablation_runs import (
    Head,
    Method,
    ablate_heads,
    all_heads,
    check_heads,
    possible_methods,
)
from vit_mechinterp.circuits.cells import BatchSize, compared, grouped, measure
from vit_mechinterp.circuits.effects import effect_columns, gap_problem
from vit_mechinterp.circuits.images import image_column
from vit_mechinterp.circuits.metrics import MetricLike
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import bootstrap_interval, check_resampling
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["cumulative_ablation"]

_MOST_STEPS = 32


def cumulative_ablation(
    vit: HookedViT,
    images: Any,
    *,
    order: Sequence[Head] | Literal["effect"] = "effect",
    method: Method = "mean",
    random_orders: int = 3,
    step: int | None = None,
    metric: MetricLike | None = None,
    base: str = "base",
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Ablate more and more heads, the most important first, last, and in random orders.

    Args:
        vit: the model.
        images: images, a folder, or data; see `image_column`.
        order: heads ``(layer, head)``, the most important first; ``"effect"`` orders them by how much the
            metric falls when each is ablated alone, on the same images.
        method: ``"mean"``, ``"zero"`` or ``"resample"``.
        random_orders: how many random orders to compare with.
        step: heads between two points of a curve; by default so many that a curve has at most 32 points.
        metric: see `vit_mechinterp.circuits.metrics`; by default the lead of the predicted class.
        base: the image column.
        resamples: resamples of the bootstrap over images.
        seed: seeds the bootstrap, the random orders and the images that resampling takes.
        folder: keeps finished points, so that the same call goes on where it was stopped.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per order and point: ``order, ablated`` (number of heads), ``last`` (the head ablated
        last), the columns of `effect_columns`, and the interval of the value itself. Figure: the curves.

    Raises:
        SpecError: a head or the method is none; DataError: the method needs more images.
    """
    check_resampling(resamples, seed)
    data = image_column(images, vit, column=base)
    n = Data(data, vit).n
    possible_methods([method], n)
    every, left_out = all_heads(vit)
    heads = every if order == "effect" else check_heads(vit, order)
    counts = _counts(len(heads), step)
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    bound, origin, clean = compared(vit, data, metric, base=base, source=None, folder=folder, **how)
    size = clean[0].numel()
    provenances: list[Mapping[str, Any]] = [origin]
    if order == "effect":
        runs = [ablate_heads(f"alone, {head}", [head], method, base, seed) for head in heads]
        alone = measure(vit, grouped(runs, n, size), data, bound, folder=folder, **how)
        provenances += alone.provenances
        left = alone.stack([run.name for run in runs]).mean(dim=1).numpy()
        heads = [heads[int(i)] for i in np.argsort(left, kind="stable")]
    draw = np.random.default_rng(seed)
    orders = {"most important first": heads, "least important first": heads[::-1]}
    orders |= {
        f"random order {k + 1}": [heads[int(i)] for i in draw.permutation(len(heads))]
        for k in range(random_orders)
    }
    runs = []
    rows: list[dict[str, Any]] = []
    for name, own in orders.items():
        for count in counts:
            run = ablate_heads(f"{name}, {count}", own[:count], method, base, seed)
            runs.append(run)
            last = f"layer {own[count - 1][0]}, head {own[count - 1][1]}" if count else ""
            rows.append({"order": name, "ablated": count, "last": last})
    measured = measure(vit, grouped(_once(runs), n, size), data, bound, folder=folder, **how)
    provenances += measured.provenances
    names = {run.interventions: run.name for run in reversed(runs)}
    values = measured.stack([names[run.interventions] for run in runs])
    effects = effect_columns(values, bound.clean, resamples=resamples, seed=seed)
    if n > 1:
        ends = bootstrap_interval(values.numpy(), resamples=resamples, seed=seed)
        effects |= {"value_low": ends[0], "value_high": ends[1]}
    table = _table(rows, effects)
    missing = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
    nothing = values[counts.index(len(heads))]
    problem = gap_problem(nothing, bound.clean, (f"with all {len(heads)} heads ablated", "with none"))
    summary, sentence = _findings(table, float(bound.clean.mean()), bound.label, problem)
    ranked = "on the same images" if order == "effect" else "as given"
    return CircuitResult(
        name="cumulative_ablation",
        table=table,
        provenance=provenance(
            *provenances,
            metric=bound.description,
            method=method,
            order=[list(head) for head in heads],
            left_out=left_out,
            resamples=resamples,
            seed=seed,
        ),
        summary=summary,
        description="\n\n".join(
            filter(
                None,
                [
                    f"Heads are ablated one after another ({method}), ordered by their own effect "
                    f"({ranked}), the other way round, and at random. A model whose work is done by few "
                    "heads falls early on the first curve and late on the second.",
                    bound.description,
                    sentence,
                    f"Left out: {missing}." if missing else "",
                ],
            )
        ),
        captions={
            "curves": f"The {bound.label} as heads are ablated, with 95 % bootstrap intervals over images; "
            "grey: random orders."
        },
        draw=lambda result: _draw(result, bound.label, float(bound.clean.mean())),
    )


def _counts(n: int, step: int | None) -> list[int]:
    if step is None:
        step = max(1, -(-n // _MOST_STEPS))
    if step < 1:
        raise SpecError(f"step={step} must be a positive number of heads.")
    return sorted({*range(0, n, step), n})


def _once(runs: Sequence[Run]) -> list[Run]:
    """Runs of one and the same set of heads only once."""
    return list({run.interventions: run for run in reversed(runs)}.values())[::-1]


def _table(rows: list[dict[str, Any]], effects: dict[str, Any]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat([pd.DataFrame(rows), pd.DataFrame(effects)], axis=1)


def _findings(
    table: pd.DataFrame, clean: float, label: str, problem: str
) -> tuple[dict[str, float | int | str], str]:
    last = int(table["ablated"].max())
    nothing_left = float(table.loc[table["ablated"] == last, "value"].iloc[0])
    half = (clean + nothing_left) / 2
    summary: dict[str, float | int | str] = {
        f"{label}, clean": clean,
        f"{label}, all {last} heads ablated": nothing_left,
    }
    said = [
        f"The {label} is {clean:.3g} with nothing ablated and {nothing_left:.3g} with all {last} heads "
        "ablated."
    ]
    if not np.isfinite(nothing_left):
        return summary, f"The metric is not a finite number with all {last} heads ablated."
    if abs(clean - nothing_left) <= 0.01 * max(abs(clean), abs(nothing_left)):
        return (
            summary,
            f"{said[0]} So the heads together make no difference that could be divided among them.",
        )
    for name in ("most important first", "least important first"):
        own = table[table["order"] == name]
        below = own[(own["value"] - half) * np.sign(clean - nothing_left) < 0]
        count = int(below["ablated"].iloc[0])
        summary[f"heads to lose half, {name}"] = count
        said.append(f"Half of the difference is gone after {count} head{'s' * (count != 1)}, {name}.")
    return summary, " ".join(said)


def _draw(result: CircuitResult, label: str, clean: float) -> dict[str, Figure]:
    from vit_mechinterp.figures import Curve, curves

    lines = {}
    for name in dict.fromkeys(result.table["order"]):
        own = result.table[result.table["order"] == name]
        known = "value_low" in own
        lines[name] = Curve(
            own["ablated"].tolist(),
            own["value"].tolist(),
            own["value_low"].tolist() if known else [],
            own["value_high"].tolist() if known else [],
            control=name.startswith("random"),
        )
    figure = curves(lines, x_label="heads ablated", label=label, references={"clean": clean})
    return {"curves": figure}
