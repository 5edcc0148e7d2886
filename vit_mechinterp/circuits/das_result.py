"""The words of a distributed alignment search: what was done, and what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from vit_mechinterp.circuits.das_controls import control_words
from vit_mechinterp.circuits.das_figures import LAYER_HEAT, captions, draw
from vit_mechinterp.circuits.das_rows import NO_CONTROL
from vit_mechinterp.circuits.result import CircuitResult

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["assemble"]

_DESCRIPTION: Final = """\
At each layer a rotation of the residual stream and a gate over its coordinates are trained on pairs of \
images{tied}: the edited object of the base takes the gated coordinates of the source object, at all of its \
tokens, and the model should then answer as if the edited object had the source's value of the analysed \
attribute and nothing else had changed. The accuracy is measured on held-out pairs, with every gate fully \
open or closed.

A layer of high accuracy holds the attribute in a subspace of the object's own tokens, apart from its other \
attribute, and the decision is still made from there. {controls}Guessing gives the chance line. The \
no-effect line is the accuracy if the intervention changed nothing; layers behind the decision fall to it.

After Lepori et al. 2024, "Beyond the Doors of Perception"."""

_CONTROLS: Final = {
    "wrong_object": (
        "The wrong-object control is trained and measured in the same way, but takes the other object of the "
        "source image: it shows what a trained subspace reaches without the wanted attribute. "
    ),
    "random_patch": (
        "The random-patch control exchanges as many random patches of both images, which no object covers. "
    ),
    "random_patch_anywhere": (
        "The control of random patches anywhere does the same with patches that may lie on objects. "
    ),
    "random_weights": (
        "The random-weights control searches the same architecture with fresh weights: what a rotation can "
        "force out of a model that has learned nothing. "
    ),
}


def assemble(
    table: pd.DataFrame,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    chance: float,
    heat: Sequence[float] | None = None,
) -> CircuitResult:
    """The result of one search or of several; ``heat`` colours the layers of the figures."""
    d = max((tensor.shape[-1] for tensor in tensors.values()), default=0)
    summary: dict[str, float | int | str] = {}
    found = []
    for attribute, rows in table.groupby("attribute", sort=False):
        numbers, sentence = _best(str(attribute), rows, d)
        summary |= numbers
        found.append(sentence)
    controls = "".join(_CONTROLS.get(control, "") for control in dict.fromkeys(table["control"]))
    return CircuitResult(
        name="das",
        title="Distributed alignment search",
        table=table,
        tensors=tensors,
        provenance={**record, LAYER_HEAT: list(heat)} if heat is not None else record,
        summary={**summary, "chance": chance},
        description=f"{_DESCRIPTION.format(controls=controls, tied=_tied(tensors))}\n\n{' '.join(found)}",
        captions=captions(table, heat is not None),
        draw=draw,
    )


def _best(attribute: str, table: pd.DataFrame, d: int) -> tuple[dict[str, float | int | str], str]:
    """What was found for one attribute at its best layer, beside its controls: numbers, and a sentence."""
    splits = list(dict.fromkeys(table["split"]))
    everything, table = table, table[table["split"] == splits[0]]
    lines = {str(control): _means(rows) for control, rows in table.groupby("control", sort=False)}
    leading = NO_CONTROL if NO_CONTROL in lines else next(iter(lines))
    search = lines.pop(leading)
    name = attribute if leading == NO_CONTROL else f"{attribute}, {control_words(leading)}"
    accuracy, rank = search["accuracy"], search["rank"]
    layer = max(accuracy, key=lambda n: (accuracy[n], -n))
    summary: dict[str, float | int | str] = {f"{name}, layer {layer}": accuracy[layer]}
    said = ""
    for control, rows in lines.items():
        other = rows["accuracy"][layer]
        summary[f"{attribute}, {control_words(control)}"] = other
        said += f", and the {control_words(control)} to {other:.0%}"
    elsewhere = []
    for split in splits[1:]:
        own = everything[(everything["split"] == split) & (everything["control"] == leading)]
        value = _means(own)["accuracy"][layer]
        summary[f"{name}, layer {layer}, {split}"] = value
        elsewhere.append(f"{value:.0%} of split {split}")
    also = f" The same subspace does so to {' and '.join(elsewhere)}." if elsewhere else ""
    seeds = table["seed"].nunique()
    sentence = (
        f"{name.capitalize()}: best in layer {layer}, where exchanging {rank[layer]:.0f} of {d} dimensions "
        f"gives the counterfactual answer to {accuracy[layer]:.0%} of {table['n'].iloc[0]} held-out pairs"
        f"{said}; in layer {max(accuracy)}, the last searched, to {accuracy[max(accuracy)]:.0%}."
        f"{also}{f' Means of {seeds} seeds.' if seeds > 1 else ''}"
    )
    return summary, sentence


def _means(rows: pd.DataFrame) -> dict[str, dict[int, float]]:
    """Accuracy and rank by layer, means over seeds."""
    means = rows.groupby("layer")[["accuracy", "rank"]].mean()
    layers = means.index.tolist()
    return {name: dict(zip(layers, means[name].tolist(), strict=True)) for name in ("accuracy", "rank")}


def _tied(tensors: Mapping[str, Tensor]) -> str:
    """Which tokens share a subspace."""
    by_token = any(tensor.ndim == 3 for tensor in tensors.values())
    return ", one for each token of an object" if by_token else ", the same for all tokens of an object"
