"""Faithfulness and completeness of a set of heads: is it the circuit, and is it all of it?

Faithfulness: with every other head ablated, how much of the model's behaviour remains,
``(m(C) - m(nothing)) / (m(model) - m(nothing))``, where ``nothing`` has all heads ablated. Completeness:
without the set, how much remains (the complement's faithfulness; Marks et al. 2024), and, for subsets K of C
taken away from both, how far the circuit and the model part (Wang et al. 2023, section 4). Minimality: what
each head of the set adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from vit_mechinterp.circuits.effects import effect_columns
from vit_mechinterp.circuits.images import image_column
from vit_mechinterp.circuits.metrics import MetricLike
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["faithfulness"]


def faithfulness(
    vit: HookedViT,
    images: Any,
    heads: Sequence[Head],
    *,
    method: Method = "mean",
    subsets: int = 12,
    random_sets: int = 8,
    metric: MetricLike | None = None,
    base: str = "base",
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Measure how much of the model a set of heads is.

    Args:
        vit: the model.
        images: images, a folder, or data; see `image_column`.
        heads: the circuit, as ``(layer, head)``. MLPs and everything else stay.
        method: how heads are ablated: ``"mean"``, ``"zero"`` or ``"resample"``.
        subsets: random subsets of the circuit, taken away from circuit and model alike.
        random_sets: random sets of as many heads, as controls.
        metric: see `vit_mechinterp.circuits.metrics`; by default the lead of the predicted class.
        base: the image column.
        resamples: resamples of the bootstrap over images.
        seed: seeds the bootstrap, the random sets and the images that resampling takes.
        folder: keeps finished sets, so that the same call goes on where it was stopped.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per set of heads that is left in place: ``kind, heads_left, which`` and the columns of
        `effect_columns` against nothing left, so that ``normalised`` is the faithfulness of the set. Kinds:
        ``model``, ``nothing``, ``circuit``, ``complement``, ``circuit without K`` and ``model without K``,
        ``circuit without one`` (minimality), ``random set``.

    Raises:
        SpecError: a head or the method is none, or the set holds every head; DataError: the method needs more
            images.
    """
    check_resampling(resamples, seed)
    data = image_column(images, vit, column=base)
    n = Data(data, vit).n
    possible_methods([method], n)
    every, left_out = all_heads(vit)
    circuit = check_heads(vit, heads)
    if len(circuit) == len(every):
        raise SpecError(f"The set holds all {len(every)} heads, so there is nothing to compare it with.")
    sets = _sets(every, circuit, subsets, random_sets, seed)
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    bound, origin, clean = compared(vit, data, metric, base=base, source=None, folder=folder, **how)
    runs = [
        ablate_heads(f"{kind} {k}", set(every) - set(left), method, base, seed)
        for k, (kind, left) in enumerate(sets)
    ]
    measured = measure(vit, grouped(runs, n, clean[0].numel()), data, bound, folder=folder, **how)
    values = measured.stack([run.name for run in runs])
    ends = ("without any head", "with all of them")
    effects = effect_columns(values, values[1], values[0], ends=ends, resamples=resamples, seed=seed)
    table = _table(sets, circuit, effects)
    summary = _summary(table)
    problem = str(table["reason"].iloc[0])
    missing = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
    return CircuitResult(
        name="faithfulness",
        table=table,
        provenance=provenance(
            origin,
            *measured.provenances,
            metric=bound.description,
            method=method,
            circuit=[list(head) for head in circuit],
            left_out=left_out,
            resamples=resamples,
            seed=seed,
        ),
        summary=summary,
        description="\n\n".join(
            filter(
                None,
                [
                    f"The circuit is {_listed(circuit)} of {len(every)} heads; MLPs stay in place. Heads "
                    f"outside a set are ablated ({method}). A set's faithfulness is 1 where it behaves as "
                    "the whole model, and 0 where it behaves as the model without any head. A complete "
                    "circuit leaves a complement near 0, and does what the model does when heads are taken "
                    "away from both.",
                    bound.description,
                    f"Faithfulness is not defined: {problem}." if problem else _findings(summary),
                    f"Left out: {missing}." if missing else "",
                ],
            )
        ),
        captions=_captions(table, bound.label),
        draw=lambda result: _draw(result, bound.label),
    )


def _sets(
    every: Sequence[Head], circuit: Sequence[Head], subsets: int, random_sets: int, seed: int
) -> list[tuple[str, list[Head]]]:
    """Every set of heads that is left in place, model and nothing first."""
    draw = np.random.default_rng(seed)
    own = set(circuit)
    sets: list[tuple[str, list[Head]]] = [
        ("model", list(every)),
        ("nothing", []),
        ("circuit", list(circuit)),
        ("complement", [head for head in every if head not in own]),
    ]
    for _ in range(subsets if len(circuit) > 1 else 0):
        size = int(draw.integers(1, len(circuit)))
        away = {circuit[int(i)] for i in draw.choice(len(circuit), size=size, replace=False)}
        sets.append(("circuit without K", [head for head in circuit if head not in away]))
        sets.append(("model without K", [head for head in every if head not in away]))
    sets += [("circuit without one", [h for h in circuit if h != head]) for head in circuit]
    for _ in range(random_sets):
        chosen = sorted(int(i) for i in draw.choice(len(every), size=len(circuit), replace=False))
        sets.append(("random set", [every[i] for i in chosen]))
    return sets


def _listed(heads: Sequence[Head]) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


def _table(
    sets: Sequence[tuple[str, list[Head]]], circuit: Sequence[Head], effects: dict[str, Any]
) -> pd.DataFrame:
    import pandas as pd

    which = []
    for kind, left in sets:
        gone = [head for head in circuit if head not in left]
        short = f"without {_listed(gone)}" if kind in _WITHOUT else _listed(left)
        which.append(short if kind not in ("model", "complement") else "")
    columns = {"kind": [k for k, _ in sets], "heads_left": [len(left) for _, left in sets], "which": which}
    return pd.DataFrame(columns | effects)


_COMPLEMENT, _CHANCE = "complement's faithfulness", "random sets of the same size, mean"
_WITHOUT = ("circuit without K", "model without K", "circuit without one")


def _summary(table: pd.DataFrame) -> dict[str, float | int | str]:
    def of(kind: str) -> Any:
        return table.loc[table["kind"] == kind, "normalised"].to_numpy(dtype=float)

    summary: dict[str, float | int | str] = {
        "faithfulness": float(of("circuit")[0]),
        _COMPLEMENT: float(of("complement")[0]),
    }
    if len(apart := np.abs(of("circuit without K") - of("model without K"))):
        summary["incompleteness, mean"] = float(apart.mean())
        summary["incompleteness, largest"] = float(apart.max())
    if len(chance := of("random set")):
        summary[_CHANCE] = float(chance.mean())
        summary["random sets of the same size, best"] = float(chance.max())
    single = float(of("circuit")[0]) - of("circuit without one")
    summary["least that a head adds"] = float(single[np.argmin(np.abs(single))])
    return summary


def _findings(summary: dict[str, float | int | str]) -> str:
    said = (
        f"The circuit's faithfulness is {summary['faithfulness']:.2f}, its complement's "
        f"{summary[_COMPLEMENT]:.2f}"
    )
    if _CHANCE in summary:
        said += f"; random sets of the same size reach {summary[_CHANCE]:.2f} on average"
    return said + "."


def _captions(table: pd.DataFrame, label: str) -> dict[str, str]:
    sets = (
        "the circuit, of its complement, of the circuit without each of its heads, and of random sets of the "
        "same size, with 95 % bootstrap intervals over images."
    )
    if table["normalised"].isna().all():
        return {
            "change": f"Change of the {label} against the model without any head, of the model, of {sets}"
        }
    captions = {"faithfulness": f"Faithfulness of {sets}"}
    if (table["kind"] == "circuit without K").any():
        captions["completeness"] = (
            "Faithfulness of the model and of the circuit when the same heads K are taken away from both; on "
            "the line the circuit is complete."
        )
    return captions


def _draw(result: CircuitResult, label: str) -> dict[str, Figure]:
    from vit_mechinterp.figures import dots_by_row, predicted_against_exact

    table = result.table
    if table["normalised"].isna().all():
        rows = _rows(table, "change", "model")
        figure = dots_by_row(
            {"set": rows}, label=f"change of {label}", limits=_limits(rows, 0), references={"nothing": 0.0}
        )
        return {"change": figure}
    rows = _rows(table, "normalised")
    figures = {
        "faithfulness": dots_by_row(
            {"set": rows},
            label="faithfulness",
            limits=_limits(rows, 0, 1),
            references={"nothing": 0.0, "model": 1.0},
        )
    }
    pair = [table.loc[table["kind"] == f"{who} without K", "normalised"] for who in ("circuit", "model")]
    if len(pair[0]):
        figures["completeness"] = predicted_against_exact(
            {"K": (pair[0].to_numpy(dtype=float), pair[1].to_numpy(dtype=float))},
            label="faithfulness without K",
            axes_labels=("model without K", "circuit without K"),
        )
    return figures


def _rows(table: pd.DataFrame, column: str, *more: str) -> dict[str, tuple[float, float, float]]:
    """A column and its interval, by the name of the set; ``more`` are further kinds of sets to show."""
    shown = table[table["kind"].isin([*more, "circuit", "complement", "circuit without one", "random set"])]
    rows: dict[str, tuple[float, float, float]] = {}
    for kind, own in shown.groupby("kind", sort=False):
        for number, (_, row) in enumerate(own.iterrows(), 1):
            value, low, high = (float(row[f"{column}{end}"]) for end in ("", "_low", "_high"))
            name = {"circuit without one": f"circuit {row['which']}", "random set": f"random set {number}"}
            one = np.isnan(low)  # a single image has no interval
            rows[name.get(str(kind), str(kind))] = (value, value, value) if one else (value, low, high)
    return rows


def _limits(rows: Mapping[str, tuple[float, float, float]], *others: float) -> tuple[float, float]:
    """The range of everything, with a margin."""
    every = [*others, *(end for ends in rows.values() for end in ends)]
    margin = 0.05 * (max(every) - min(every)) or 1.0
    return min(every) - margin, max(every) + margin
