"""The figures of a distributed alignment search, drawn from its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vit_mechinterp.circuits.backdrop import BACKDROP
from vit_mechinterp.circuits.das_controls import control_words
from vit_mechinterp.circuits.das_rows import NO_CONTROL

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from vit_mechinterp.circuits.result import CircuitResult
    from vit_mechinterp.figures import Curve

__all__ = ["LAYER_HEAT", "by_layer", "captions", "draw", "variant_columns"]

LAYER_HEAT: Final = "layer_heat"
"""The entry of a result's provenance that holds the global score of every layer."""

_LABEL: Final = "held-out interchange accuracy"
_PREFIX: Final = "accuracy_"


def by_layer(rows: pd.DataFrame, column: str = "accuracy") -> dict[int, tuple[float, float, float]]:
    """A column by layer with its interval: of one seed that over pairs, of several their mean and range."""
    found = {}
    for layer, own in rows.groupby("layer"):
        value = float(own[column].mean())
        ends = [float(own[column].min()), float(own[column].max())]
        if len(own) == 1 and f"{column}_low" in own:
            ends = [float(own[f"{column}_{end}"].iloc[0]) for end in ("low", "high")]
        found[int(str(layer))] = (value, ends[0], ends[1])
    return found


def variant_columns(table: pd.DataFrame) -> dict[str, str]:
    """The columns of accuracies of variants, with the words a reader sees."""
    own = [c for c in table.columns if c.startswith(_PREFIX) and not c.endswith(("_low", "_high"))]
    return {c: c.removeprefix(_PREFIX).replace("_", ", ") for c in own}


def captions(table: pd.DataFrame, stages: bool) -> dict[str, str]:
    """What each figure shows."""
    band = (
        "Bands are ranges over seeds."
        if table["seed"].nunique() > 1
        else "Bands are 95 % bootstrap intervals over held-out pairs."
    )
    tint = BACKDROP if stages else ""
    names = _figures(table)
    control = next((c for c in table["control"] if c != NO_CONTROL), None)
    dashed = (
        f", dashed lines its {control_words(control)} control"
        if control and "das_controls" not in names
        else ""
    )
    found = {
        "das_by_layer": (
            "Held-out interchange accuracy by layer: the fraction of pairs on which exchanging the trained "
            "subspace leads to the counterfactual answer. Stars mark the best layer of each attribute"
            f"{dashed}. {band}{tint}"
        ),
        "das_controls": (
            "The search beside its controls, each a search of its own: the wrong object of the source image; "
            "random patches; the same architecture with fresh weights. Dashed lines are controls. "
            f"{band}{tint}"
        ),
        "das_splits": (
            f"Interchange accuracy on every split of held-out pairs, with the same subspaces. {band}{tint}"
        ),
        "das_variants": (
            "Interchange accuracy by the relation of the edited pair before the edit, and by which pair is "
            f"edited. {band}{tint}"
        ),
    }
    return {name: found[name] for name in names}


def _figures(table: pd.DataFrame) -> list[str]:
    names = ["das_by_layer"]
    controls = set(table["control"]) - {NO_CONTROL}
    if len(controls) > 1 and NO_CONTROL in set(table["control"]):
        names.append("das_controls")
    if table["split"].nunique() > 1:
        names.append("das_splits")
    if variant_columns(table):
        names.append("das_variants")
    return names


def draw(result: CircuitResult) -> dict[str, Figure]:
    """Accuracy by layer with its controls, chance and no effect; layers left out are gaps in the lines."""
    from vit_mechinterp.figures import panels_by_layer

    table = result.table
    if "split" not in table:  # a result that was saved without splits
        table = table.assign(split="test")
    first = table[table["split"] == table["split"].iloc[0]]
    chance = {"chance": float(result.summary["chance"])}
    heat = result.provenance.get(LAYER_HEAT)
    figures = {"das_by_layer": _by_layer_figure(first, chance["chance"], heat)}
    searches = table[table["control"] == NO_CONTROL]
    panels: dict[str, dict[str, dict[str, Curve]]] = {
        "das_controls": {
            str(attribute): {
                "search" if control == NO_CONTROL else control_words(str(control)): _curve(
                    rows, control=control != NO_CONTROL
                )
                for control, rows in own.groupby("control", sort=False)
            }
            for attribute, own in first.groupby("attribute", sort=False)
        },
        "das_splits": {
            str(split): {
                str(attribute): _curve(rows) for attribute, rows in own.groupby("attribute", sort=False)
            }
            for split, own in searches.groupby("split", sort=False)
        },
        "das_variants": {
            str(attribute): {words: _curve(rows, column) for column, words in variant_columns(table).items()}
            for attribute, rows in first[first["control"] == NO_CONTROL].groupby("attribute", sort=False)
        },
    }
    for name in _figures(table)[1:]:
        if panels[name]:
            figures[name] = panels_by_layer(panels[name], label=_LABEL, references=chance, backdrop=heat)
    return figures


def _curve(rows: pd.DataFrame, column: str = "accuracy", *, control: bool = False) -> Curve:
    from vit_mechinterp.figures import Curve

    found = by_layer(rows, column)
    values, low, high = (list(own) for own in zip(*found.values(), strict=True))
    flat = low == values == high
    return Curve(list(found), values, [] if flat else low, [] if flat else high, control=control)


def _by_layer_figure(table: pd.DataFrame, chance: float, heat: Sequence[float] | None) -> Figure:
    from vit_mechinterp.figures import das_by_layer

    every = range(max(int(table["layer"].max()) + 1, len(heat or ())))
    shown = [c for c in dict.fromkeys(table["control"]) if c != NO_CONTROL]
    accuracy: dict[str, list[float]] = {}
    bands: dict[str, Any] = {}
    controls: dict[str, list[float]] = {}
    no_effect: dict[str, float] = {}
    for (attribute, control), rows in table.groupby(["attribute", "control"], sort=False):
        found = by_layer(rows)
        gap = (float("nan"),) * 3
        line, low, high = ([found.get(layer, gap)[k] for layer in every] for k in range(3))
        alone = not ((table["attribute"] == attribute) & (table["control"] == NO_CONTROL)).any()
        if control == NO_CONTROL or alone:
            name = str(attribute) if control == NO_CONTROL else f"{attribute}, {control_words(str(control))}"
            accuracy[name] = line
            bands[name] = low, high
            no_effect[name] = float(rows["no_effect"].iloc[0])
        elif len(shown) == 1:
            controls[str(attribute)] = line
    return das_by_layer(
        accuracy,
        controls=controls,
        control_name=control_words(shown[0]) if shown else "control",
        chance=chance,
        no_effect=no_effect,
        bands=bands,
        backdrop=heat,
        label=_LABEL,
    )
