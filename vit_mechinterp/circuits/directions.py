"""Mean-difference directions: from the mean activation of one group of images to that of another.

The simplest linear direction for a property (Marks and Tegmark 2023; in steering work Turner et al. 2023).
Half of the images makes it, the other half says how well it separates the groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from vit_mechinterp.circuits.features import features_at, labels_of, readable_sites
from vit_mechinterp.circuits.images import image_column
from vit_mechinterp.circuits.reading import read_from, reading_data
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.errors import DataError, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["mean_directions"]


def mean_directions(
    vit: HookedViT,
    images: Any,
    *,
    label: str = "label",
    to: str | int | None = None,
    away: str | int | None = None,
    sites: Sequence[str] | str = "resid_post",
    tokens: Any = "all",
    base: str = "base",
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> CircuitResult:
    """Return the direction between two groups of images at every site.

    Args:
        vit: the model.
        images: data with a column of labels.
        label: that column.
        to, away: the label that directions lead to, and the one that they lead away from; by default the last
            and the first in order. ``away`` left out with more than two labels means all others.
        sites: site names, globs, or short names that mean every block.
        tokens: the tokens whose mean activation is taken.
        base: the image column.
        seed: of the split into halves and of the control labels.
        folder: keeps what has been read, so that the same call goes on where it was stopped.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per site: ``site, layer, norm`` of the direction, ``separation`` (area under the ROC
        curve of the held-out half along the direction of the other half, both ways averaged; 0.5 is none),
        ``control_separation`` (labels in random order), ``cosine`` between both halves' directions.
        ``tensors`` holds one direction ``[feature]`` per site, from all images: give it to `steering` or
        `AddDirection`.

    Raises:
        DataError: there is no such column or label, or a group has fewer than four images.
    """
    data = image_column(images, vit, column=base)
    columns = reading_data(vit, data, base, progress=progress)
    numbers, names = labels_of(columns, label)
    one = _label(names, to, len(names) - 1, label)
    other = None
    if away is not None or len(names) == 2:
        other = _label(names, away, 0 if one else len(names) - 1, label)
    positive = numbers == one
    negative = ~positive if other is None else numbers == other
    if min(positive.sum(), negative.sum()) < 4 or one == other:
        raise DataError(
            f"{int(positive.sum())} images are labelled {names[one]!r} and {int(negative.sum())} the other "
            "way; each group needs four or more, to be cut into halves, and the labels must differ."
        )
    chosen, left_out = readable_sites(vit, sites)
    features = features_at(vit, columns, base, chosen, tokens, folder=folder, progress=progress)
    keep = np.flatnonzero(positive | negative)
    y = positive[keep]
    half = _halves(y, seed)
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(y)
    halves_of_shuffled = _halves(shuffled, seed)
    rows, tensors = [], {}
    for site in chosen:
        x = features[site].double().numpy()[keep]
        first, second = _direction(x[half], y[half]), _direction(x[~half], y[~half])
        parsed = Site.parse(site)
        whole = _direction(x, y)
        rows.append(
            {
                "site": parsed.name, "layer": parsed.layer, "norm": float(np.linalg.norm(whole)),
                "separation": _separation(x, y, half), "control_separation": _separation(x, shuffled,
                halves_of_shuffled), "cosine": float(first @ second / max(np.linalg.norm(first) *
                np.linalg.norm(second), 1e-30)),
            }
        )  # fmt: skip
        tensors[site] = torch.from_numpy(whole).float()
    import pandas as pd

    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    top = table.iloc[int(table["separation"].argmax())]
    said = f"{names[one]} against {'the others' if other is None else names[other]}"
    where = "" if str(top["layer"]) == "<NA>" else f", layer {top['layer']}"
    return CircuitResult(
        name="mean_directions",
        table=table,
        provenance=read_from(
            vit,
            columns,
            [base, label],
            left_out=left_out,
            label=label,
            direction=said,
            tokens=str(tokens),
            seed=seed,
        ),
        summary={
            "direction": said,
            "images": len(keep),
            "best separation": f"{top['separation']:.3f} at {top['site']}{where}",
            "best separation, control": float(top["control_separation"]),
        },
        description=_DESCRIPTION,
        captions={"separation": f"How well the direction for {said} separates images that did not make it."},
        draw=_draw,
        tensors=tensors,
    )


def _label(names: Sequence[str], given: str | int | None, default: int, column: str) -> int:
    if given is None:
        return default
    if str(given) not in names:
        raise DataError(
            f"No example has the label {given!r} in {column!r}.{suggest(str(given), names)} Labels: "
            f"{', '.join(names)}."
        )
    return list(names).index(str(given))


def _halves(y: Any, seed: int) -> Any:
    """Choose half of each group."""
    generator = np.random.default_rng(seed)
    half = np.zeros(len(y), dtype=bool)
    for group in (y, ~y):
        members = generator.permutation(np.flatnonzero(group))
        half[members[: len(members) // 2]] = True
    return half


def _direction(x: Float[np.ndarray, "example feature"], y: Any) -> Float[np.ndarray, " feature"]:
    direction: Float[np.ndarray, " feature"] = x[y].mean(axis=0) - x[~y].mean(axis=0)
    return direction


def _separation(x: Float[np.ndarray, "example feature"], y: Any, half: Any) -> float:
    from sklearn.metrics import roc_auc_score

    scores = [roc_auc_score(y[~own], x[~own] @ _direction(x[own], y[own])) for own in (half, ~half)]
    return float(np.mean(scores))


_DESCRIPTION = (
    "A direction leads from the mean activation of one group of images to that of another. Separation is the "
    "chance that an image of the first group lies further along it than one of the second, on images that "
    "did not make the direction: 0.5 is none, 1 is complete. Whether the model uses it, steering tells."
)


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures import Curve, curves, dots_by_row

    table, lines = result.table, {}
    groups = list(table.groupby("site", sort=False))
    if table["layer"].isna().any() or min(len(rows) for _, rows in groups) < 2:
        rows = {
            "direction": dict(zip(_places(table), table["separation"], strict=True)),
            "control labels": dict(zip(_places(table), table["control_separation"], strict=True)),
        }
        dots = {what: {place: (v, v, v) for place, v in own.items()} for what, own in rows.items()}
        return {"separation": dots_by_row(dots, label="separation (AUC)", references={"chance": 0.5})}
    for site, own in groups:
        lines[str(site)] = Curve(own["layer"].tolist(), own["separation"].tolist())
        name = "control labels" if len(groups) == 1 else f"control, {site}"
        lines[name] = Curve(own["layer"].tolist(), own["control_separation"].tolist(), control=True)
    return {
        "separation": curves(lines, x_label="layer", label="separation (AUC)", references={"chance": 0.5})
    }


def _places(table: pd.DataFrame) -> list[str]:
    return [
        str(site) if str(layer) == "<NA>" else f"{site}, layer {layer}"
        for site, layer in zip(table["site"], table["layer"], strict=True)
    ]
