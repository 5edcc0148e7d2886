"""The words and the figure of novel representations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from vit_mechinterp.circuits.backdrop import BACKDROP
from vit_mechinterp.circuits.das_figures import LAYER_HEAT, by_layer
from vit_mechinterp.circuits.result import CircuitResult

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["SUBSPACE", "WHOLE", "assemble"]

SUBSPACE: Final = "subspace"
WHOLE: Final = "whole residual"

_DESCRIPTION: Final = """\
In the subspaces that a distributed alignment search found, both objects of a pair get a vector that no \
image gave: the same one where the answer should become "same", two different ones where it should become \
"different". Added vectors are the sum of two objects' own, interpolated ones their mean; sampled ones are \
normal noise with the mean and the deviation of all objects in every dimension, random ones standard normal \
noise. The accuracy is the share of held-out pairs that get the counterfactual answer.

High accuracy says that the decision compares what stands in the subspace, also where it is new. Guessing \
gives the chance line: a decision that takes every novel vector for "different" answers half of the pairs.

After Lepori et al. 2024, "Beyond the Doors of Perception"."""


def assemble(
    table: pd.DataFrame, record: Mapping[str, Any], chance: float, heat: Sequence[float] | None
) -> CircuitResult:
    """The result; ``heat`` colours the layers of the figure."""
    summary: dict[str, float | int | str] = {}
    found = []
    for (attribute, space), own in table.groupby(["attribute", "space"], sort=False):
        name = str(attribute) if space == SUBSPACE else f"{attribute}, {space}"
        said = []
        for method, rows in own.groupby("method", sort=False):
            values = {layer: value for layer, (value, *_) in by_layer(rows).items()}
            layer = max(values, key=lambda n: (values[n], -n))
            summary[f"{name}, {method}, layer {layer}"] = values[layer]
            said.append(f"{method} {values[layer]:.0%} (layer {layer})")
        found.append(f"{name.capitalize()}, highest over layers: {', '.join(said)}.")
    draws = "Two vectors are drawn for every pair."
    if record["draws"] == "batch":
        draws = f"Two vectors are drawn for {record['draw_batch']} pairs at a time, as in the published code."
    band = (
        "Bands are ranges over the seeds of the search."
        if table["seed"].nunique() > 1
        else "Bands are 95 % bootstrap intervals over what was drawn."
    )
    return CircuitResult(
        name="novel_representations",
        title="Novel representations",
        table=table,
        provenance={**record, LAYER_HEAT: list(heat)} if heat is not None else record,
        summary={**summary, "chance": chance},
        description=f"{_DESCRIPTION}\n\n{draws} {' '.join(found)}",
        captions={
            "novel_representations": (
                "Share of held-out pairs that get the counterfactual answer when novel vectors are written "
                "into both objects, by layer and by how the vectors are made; stars mark the best layers. "
                f"{band}{BACKDROP if heat is not None else ''}"
            )
        },
        draw=_draw,
    )


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures import Curve, panels_by_layer

    panels: dict[str, dict[str, Curve]] = {}
    for (attribute, space), own in result.table.groupby(["attribute", "space"], sort=False):
        lines = {}
        for method, rows in own.groupby("method", sort=False):
            found = by_layer(rows)
            values, low, high = (list(ends) for ends in zip(*found.values(), strict=True))
            lines[str(method)] = Curve(list(found), values, low, high)
        panels[str(attribute) if space == SUBSPACE else f"{attribute}, {space}"] = lines
    figure = panels_by_layer(
        panels,
        label="counterfactual answers",
        references={"chance": float(result.summary["chance"])},
        backdrop=result.provenance.get(LAYER_HEAT),
        columns=2,
    )
    return {"novel_representations": figure}
