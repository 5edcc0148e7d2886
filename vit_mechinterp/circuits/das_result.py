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

__all__ = ["NO_CONTROL", "assemble", "draw", "table_of"]

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


def table_of(
    results: Results,
    labels: Tensor,
    runs: Mapping[int, Run],
    tensors: Mapping[str, Tensor],
    losses: Mapping[int, float],
    attribute: str,
    control: str,
) -> pd.DataFrame:
    """One row per layer.

    Args:
        results: held-out outputs of every run, and of a run called "clean".
        labels: the wanted classes ``[example]``.
        runs: by layer.
        tensors: the trained tensors by name.
        losses: the mean training loss by layer.
        attribute, control: what was searched.
    """
    import pandas as pd

    def accuracy(run: str) -> float:
        return float((results[run].argmax(dim=-1) == labels).double().mean())

    rows = [
        {
            "attribute": attribute,
            "control": control,
            "layer": layer,
            "site": run.interventions[0].site,
            "accuracy": accuracy(run.name),
            "rank": int(tensors[gate_name(layer)].sum()),
            "loss": float(torch.nn.functional.cross_entropy(results[run.name], labels)),
            "train_loss": losses[layer],
            "no_effect": accuracy("clean"),
            "n": len(labels),
        }
        for layer, run in runs.items()
    ]
    return pd.DataFrame(rows)


def assemble(
    table: pd.DataFrame, tensors: Mapping[str, Tensor], record: Mapping[str, Any], chance: float
) -> CircuitResult:
    """The result of one search or of several."""
    return CircuitResult(
        name="das",
        title="Distributed alignment search",
        table=table,
        tensors=tensors,
        provenance=record,
        summary={**_summary(table), "chance": chance},
        description=_DESCRIPTION,
        captions={"das_by_layer": _CAPTION},
        draw=draw,
    )


def _summary(table: pd.DataFrame) -> dict[str, float | int | str]:
    """Each search at its best layer."""
    summary: dict[str, float | int | str] = {}
    for (attribute, control), rows in table.groupby(["attribute", "control"], sort=False):
        name = str(attribute) if control == NO_CONTROL else f"{attribute}_{control}"
        best = rows.iloc[int(rows["accuracy"].to_numpy().argmax())]
        summary[f"{name}_accuracy"] = float(best["accuracy"])
        summary[f"{name}_layer"] = int(best["layer"])
        summary[f"{name}_rank"] = int(best["rank"])
    return summary


def draw(result: CircuitResult) -> dict[str, Figure]:
    """Accuracy by layer with its controls, chance and no effect; layers left out are gaps in the lines."""
    from vit_mechinterp.figures import das_by_layer

    table = result.table
    every = range(int(table["layer"].max()) + 1)
    accuracy: dict[str, list[float]] = {}
    controls: dict[str, list[float]] = {}
    no_effect: dict[str, float] = {}
    for (attribute, control), rows in table.groupby(["attribute", "control"], sort=False):
        line = rows.set_index("layer")["accuracy"].reindex(every).astype(float).tolist()
        alone = not ((table["attribute"] == attribute) & (table["control"] == NO_CONTROL)).any()
        if control == NO_CONTROL or alone:
            words = str(control).replace("_", " ")
            name = str(attribute) if control == NO_CONTROL else f"{attribute}, {words}"
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
