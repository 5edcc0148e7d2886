"""The table, the words and the figure of a distributed alignment search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from vit_mechinterp.circuits.alignment import gate_name
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.engine import Results
from vit_mechinterp.spec import Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["NO_CONTROL", "assemble", "draw", "rows_of"]

NO_CONTROL: Final = "none"

_DESCRIPTION = """\
At each layer a rotation of the residual stream and a gate over its coordinates are trained on pairs of \
images: the edited object of the base takes the gated coordinates of the source object, at all of its \
tokens, and the model should then answer as if the edited object had the source's value of the analysed \
attribute and nothing else had changed. The accuracy is measured on held-out pairs, with every gate fully \
open or closed.

A layer of high accuracy holds the attribute in a subspace of the object's own tokens, apart from its other \
attribute, and the decision is still made from there. The wrong-object control is trained and measured in \
the same way, but takes the other object of the source image: it shows what a trained subspace reaches \
without the wanted attribute. Guessing gives the chance line. The no-effect line is the accuracy if the \
intervention changed nothing; layers behind the decision fall to it.

After Lepori et al. 2024, "Beyond the Doors of Perception"."""

_CAPTION = """\
Held-out interchange accuracy by layer: the fraction of pairs on which exchanging the trained subspace leads \
to the counterfactual answer. Stars mark the best layer of each attribute, dashed lines its wrong-object \
control."""


def rows_of(
    results: Results,
    labels: Tensor,
    runs: Mapping[int, Run],
    tensors: Mapping[str, Tensor],
    losses: Mapping[int, float],
    prefix: str,
    facts: Mapping[str, object],
) -> list[dict[str, Any]]:
    """One row per layer of one search.

    Args:
        results: held-out outputs of every run, and of a run called "clean".
        labels: the wanted classes ``[example]``.
        runs: by layer.
        tensors: the trained tensors by name.
        losses: the mean training loss by layer.
        prefix: what the names of the search's tensors begin with.
        facts: what is said of every row: what was searched, from which seed.
    """

    def accuracy(run: str) -> float:
        return float((results[run].argmax(dim=-1) == labels).double().mean())

    return [
        {
            **facts,
            "layer": layer,
            "site": run.interventions[0].site,
            "accuracy": accuracy(run.name),
            "rank": int(tensors[prefix + gate_name(layer)].sum()),
            "loss": float(torch.nn.functional.cross_entropy(results[run.name], labels)),
            "train_loss": losses[layer],
            "no_effect": accuracy("clean"),
            "n": len(labels),
        }
        for layer, run in runs.items()
    ]


def assemble(
    table: pd.DataFrame, tensors: Mapping[str, Tensor], record: Mapping[str, Any], chance: float
) -> CircuitResult:
    """The result of one search or of several."""
    d = max((len(tensor) for tensor in tensors.values()), default=0)
    summary: dict[str, float | int | str] = {}
    found = []
    for attribute, rows in table.groupby("attribute", sort=False):
        numbers, sentence = _best(str(attribute), rows, d)
        summary |= numbers
        found.append(sentence)
    return CircuitResult(
        name="das",
        title="Distributed alignment search",
        table=table,
        tensors=tensors,
        provenance=record,
        summary={**summary, "chance": chance},
        description=f"{_DESCRIPTION}\n\n{' '.join(found)}",
        captions={"das_by_layer": _CAPTION},
        draw=draw,
    )


def _best(attribute: str, table: pd.DataFrame, d: int) -> tuple[dict[str, float | int | str], str]:
    """What was found for one attribute at its best layer, beside its controls: numbers, and a sentence."""
    lines = {str(control): _by_layer(rows) for control, rows in table.groupby("control", sort=False)}
    leading = NO_CONTROL if NO_CONTROL in lines else next(iter(lines))
    search = lines.pop(leading)
    name = attribute if leading == NO_CONTROL else f"{attribute}, {_words(leading)}"
    accuracy, rank = search["accuracy"], search["rank"]
    layer = max(accuracy, key=lambda n: (accuracy[n], -n))
    summary: dict[str, float | int | str] = {f"{name}, layer {layer}": accuracy[layer]}
    said = ""
    for control, rows in lines.items():
        other = rows["accuracy"][layer]
        summary[f"{attribute}, {_words(control)}"] = other
        said += f", and the {_words(control)} to {other:.0%}"
    seeds = table["seed"].nunique()
    sentence = (
        f"{name.capitalize()}: best in layer {layer}, where exchanging {rank[layer]:.0f} of {d} dimensions "
        f"gives the counterfactual answer to {accuracy[layer]:.0%} of {table['n'].iloc[0]} held-out pairs"
        f"{said}; in layer {max(accuracy)}, the last searched, to {accuracy[max(accuracy)]:.0%}."
        f"{f' Means of {seeds} seeds.' if seeds > 1 else ''}"
    )
    return summary, sentence


def _by_layer(rows: pd.DataFrame) -> dict[str, dict[int, float]]:
    """Accuracy and rank by layer, means over seeds."""
    means = rows.groupby("layer")[["accuracy", "rank"]].mean()
    layers = means.index.tolist()
    return {name: dict(zip(layers, means[name].tolist(), strict=True)) for name in ("accuracy", "rank")}


def _words(control: str) -> str:
    return control.replace("_", " ")


def draw(result: CircuitResult) -> dict[str, Figure]:
    """Accuracy by layer with its controls, chance and no effect; layers left out are gaps in the lines."""
    from vit_mechinterp.figures import das_by_layer

    table = result.table
    every = range(int(table["layer"].max()) + 1)
    accuracy: dict[str, list[float]] = {}
    controls: dict[str, list[float]] = {}
    no_effect: dict[str, float] = {}
    for (attribute, control), rows in table.groupby(["attribute", "control"], sort=False):
        found = _by_layer(rows)["accuracy"]
        line = [found.get(layer, float("nan")) for layer in every]
        alone = not ((table["attribute"] == attribute) & (table["control"] == NO_CONTROL)).any()
        if control == NO_CONTROL or alone:
            name = str(attribute) if control == NO_CONTROL else f"{attribute}, {_words(str(control))}"
            accuracy[name] = line
            no_effect[name] = float(rows["no_effect"].iloc[0])
        else:
            controls[str(attribute)] = line
    figure = das_by_layer(
        accuracy,
        controls=controls,
        chance=float(result.summary["chance"]),
        no_effect=no_effect,
        label="held-out interchange accuracy",
    )
    return {"das_by_layer": figure}
