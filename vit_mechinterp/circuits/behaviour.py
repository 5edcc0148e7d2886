"""Behaviour: how often models answer rightly, for every kind of image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vit_mechinterp.circuits.reading import outputs_shape
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import bootstrap_interval
from vit_mechinterp.engine import execute
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["behaviour"]

ALL = "all images"


def behaviour(
    models: Mapping[str, HookedViT],
    data: Any,
    *,
    kinds: str | None = None,
    kind_names: Mapping[str, str] | None = None,
    base: str = "base",
    label: str = "label",
    seed: int = 0,
    batch_size: Any = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Measure the accuracy of models on the same images, as a whole and for every kind of image.

    Args:
        models: name to model; outputs have one logit per class.
        data: images with their labels.
        kinds: a column that says of which kind an image is; None measures all images alone.
        kind_names: value of that column to the words a reader sees, in the order of the rows.
        base: the image column.
        label: the column of classes.
        seed: seeds the bootstrap over images.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table: ``model, kind, accuracy, accuracy_low, accuracy_high, n`` (95 % bootstrap intervals); a figure.

    Raises:
        SpecError: there is no model, or one gives no logit per class; DataError: a column is missing, or a
            label is no class of a model. Both are raised before the first forward on an image.
    """
    import pandas as pd

    if not models:
        raise SpecError("behaviour needs at least one model.")
    rows: list[dict[str, Any]] = []
    origins = []
    checked = {name: _checked(name, vit, data, base, label, kinds) for name, vit in models.items()}
    for name, (columns, labels) in checked.items():
        vit = models[name]
        of_kind = [str(value) for value in columns.values(kinds)] if kinds else []
        results = execute(vit, Run(name="clean", base=base), data, batch_size=batch_size, progress=progress)
        hits = (results["clean"].argmax(dim=-1) == labels).double().numpy()
        groups = {ALL: np.ones(len(hits), dtype=bool)}
        order = [kind for kind in dict.fromkeys([*(kind_names or {}), *of_kind]) if kind in of_kind]
        groups |= {kind: np.array(of_kind) == kind for kind in order}
        for kind, members in groups.items():
            low, high = bootstrap_interval(hits[None, members], seed=seed)
            rows.append(
                {
                    "model": name,
                    "kind": (kind_names or {}).get(kind, kind),
                    "accuracy": float(hits[members].mean()),
                    "accuracy_low": float(low[0]),
                    "accuracy_high": float(high[0]),
                    "n": int(members.sum()),
                }
            )
        origins.append(results.provenance)
    table = pd.DataFrame(rows)
    whole = table[table["kind"] == ALL]
    summary = dict(
        zip((f"accuracy, {name}" for name in whole["model"]), whole["accuracy"].tolist(), strict=True)
    )
    found = []
    for model, own in table[table["kind"] != ALL].groupby("model", sort=False):
        worst = own.iloc[int(own["accuracy"].argmin())]
        found.append(f"{model}, {worst['kind']} ({worst['accuracy']:.0%} right)")
    return CircuitResult(
        name="behaviour",
        table=table,
        provenance=provenance(*origins, seed=seed),
        summary=summary,
        description="How often the models answer rightly."
        + (f"\n\nThe hardest kind of image: {'; '.join(found)}." if found else ""),
        captions={"accuracy": "Accuracy with 95 % bootstrap intervals over images."},
        draw=_draw,
    )


def _checked(
    name: str, vit: HookedViT, data: Any, base: str, label: str, kinds: str | None
) -> tuple[Data, Int[Tensor, " example"]]:
    """The columns and the classes that a model should answer."""
    columns = Data(data, vit)
    for column in filter(None, (base, label, kinds)):
        columns.require(column, "behaviour")
    shape = outputs_shape(vit)
    if len(shape) != 1:
        raise SpecError(
            f"behaviour: {name} gives {vit.layout.output} of shape {shape}, not one logit per class."
        )
    labels = [row[0] for row in columns.integers(label)]
    wrong = [example for example, own in enumerate(labels) if not 0 <= own < shape[0]]
    if wrong:
        raise DataError(
            f"behaviour: column {label!r}, example {wrong[0]}: {labels[wrong[0]]} is no class of {name}, "
            f"which has classes 0 to {shape[0] - 1}."
        )
    columns.check_images(base)
    return columns, torch.tensor(labels)


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures import dots_by_row

    columns = ["kind", "accuracy", "accuracy_low", "accuracy_high"]
    groups = {
        str(name): {
            kind: (value, low, high) for kind, value, low, high in own[columns].itertuples(index=False)
        }
        for name, own in result.table.groupby("model", sort=False)
    }
    return {"accuracy": dots_by_row(groups, label="accuracy", references={"chance": 0.5})}
