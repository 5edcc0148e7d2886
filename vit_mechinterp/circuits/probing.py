"""Linear probes: what can be read off an activation by a linear classifier, and how much of that is the
probe.

A logistic regression is fitted on a part of the images and scored on the rest, in every fold once. Control
labels (Hewitt and Liang 2019) keep the images and lose the property: selectivity is the accuracy on the
labels minus that on the controls. A property that can be read need not be used; steering and patching tell.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.circuits.features import features_at, labels_of, readable_sites
from vit_mechinterp.circuits.images import image_column
from vit_mechinterp.circuits.kept_readings import KeptReadings
from vit_mechinterp.circuits.reading import interval_columns, read_from, reading_data
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["probing"]


def probing(
    vit: HookedViT,
    images: Any,
    *,
    label: str = "label",
    sites: Sequence[str] | str = "resid_post",
    tokens: Any = "all",
    control_by: str | None = None,
    controls: int = 3,
    folds: int = 5,
    strength: float = 1.0,
    base: str = "base",
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> CircuitResult:
    """Probe sites for a label.

    Args:
        vit: the model.
        images: data with a column of labels.
        label: that column: numbers or words.
        sites: site names, globs, or short names that mean every block (``"resid_post"``, ``"attn.z"``).
        tokens: which tokens the probe reads the mean of: a name, indices, a column, or a box.
        control_by: a column; control labels are drawn once for each of its values (the control task of Hewitt
            and Liang). Without it they are the labels in random order.
        controls: how many sets of control labels are drawn; their accuracies are averaged.
        folds: parts that the images are cut into, each label alike; each is held out once.
        strength: inverse of the L2 penalty of the regression on standardised features.
        base: the image column.
        resamples: of the bootstrap over images.
        seed: of the folds, the control labels and the bootstrap.
        folder: keeps what has been read, so that the same call goes on where it was stopped.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per site: ``site, layer, accuracy`` on held-out images with its interval,
        ``control_accuracy`` (likewise), ``selectivity``, ``chance`` (the share of the commonest label) and
        ``training_accuracy``. ``tensors`` holds, per site, the probe fitted on all images: ``SITE.weight``
        ``[class, feature]`` (``[1, feature]`` for two labels) and ``SITE.bias``, for raw features.

    Raises:
        DataError: there is no such column, a label is rarer than ``folds``; SpecError: a site is none.
    """
    check_resampling(resamples, seed)
    data = image_column(images, vit, column=base)
    columns = reading_data(vit, data, base, progress=progress)
    labels, names = labels_of(columns, label)
    counts = np.bincount(labels)
    if folds < 2 or counts.min() < folds:
        raise DataError(
            f"The label {names[int(counts.argmin())]!r} occurs {int(counts.min())} times; {folds} folds "
            "need at least two folds and each label in every one. Give more images, or fewer folds."
        )
    if strength <= 0 or controls < 1:
        raise SpecError(f"strength={strength} and controls={controls} must be positive.")
    drawn = [_controls(columns, labels, control_by, seed + index) for index in range(controls)]
    chosen, left_out = readable_sites(vit, sites)
    features = features_at(vit, columns, base, chosen, tokens, folder=folder, progress=progress)
    rows, hits, control_hits, tensors = [], [], [], {}

    def fit(site: str) -> dict[str, Tensor]:
        x = features[site].double().numpy()
        right, training = _cross_validated(x, labels, folds, strength, seed)
        by_chance = [_cross_validated(x, y, folds, strength, seed)[0] for y in drawn]
        weight, bias = _fitted(x, labels, strength)
        found = {"right": right, "by chance": np.mean(by_chance, axis=0), "training": np.array(training)}
        return {name: torch.from_numpy(values) for name, values in found.items()} | {
            "weight": torch.from_numpy(weight).float(),
            "bias": torch.from_numpy(bias).float(),
        }

    shown = tqdm(chosen, desc="probes", unit="site", delay=2.0, disable=not progress)
    # The features themselves are what decides a fit, wherever they come from.
    decided: dict[str, Any] = {"labels": labels, "drawn": drawn, "folds": folds, "strength": strength}
    with KeptReadings(folder, vit, columns, [base], reading="probes", seed=seed, **decided) as kept:
        for site in shown:
            fitted = kept.once([site, features[site]], partial(fit, site))
            hits.append(fitted["right"].numpy())
            control_hits.append(fitted["by chance"].numpy())
            place = {"site": Site.parse(site).name, "layer": Site.parse(site).layer}
            rows.append({**place, "training_accuracy": float(fitted["training"])})
            tensors[f"{site}.weight"], tensors[f"{site}.bias"] = fitted["weight"], fitted["bias"]
    table = _table(rows, np.stack(hits), np.stack(control_hits), counts.max() / len(labels), resamples, seed)
    top = table.iloc[int(table["accuracy"].argmax())]
    used = [base, label, *([control_by] if control_by else [])]
    missing = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
    return CircuitResult(
        name="probing",
        table=table,
        provenance=read_from(
            vit,
            columns,
            used,
            left_out=left_out,
            label=label,
            labels=names,
            tokens=str(tokens),
            folds=folds,
            strength=strength,
            control_by=control_by,
            controls=controls,
            seed=seed,
            resamples=resamples,
        ),
        summary={
            "images": columns.n,
            "labels": len(names),
            "best accuracy": f"{top['accuracy']:.3f} (control {top['control_accuracy']:.3f}) at {top['site']}"
            + ("" if str(top["layer"]) == "<NA>" else f", layer {top['layer']}"),
            "chance": float(table["chance"].iloc[0]),
        },
        description=_DESCRIPTION + (f"\n\nLeft out: {missing}." if missing else ""),
        captions={
            f"accuracy_{site}".replace(
                ".", "_"
            ): f"Held-out accuracy of linear probes for {label} at {site}, and "
            "on control labels. Tints: 95% bootstrap intervals."
            for site in dict.fromkeys(table["site"])
        },
        draw=lambda result: _draw(result, label),
        tensors=tensors,
    )


def _controls(columns: Any, labels: Int[np.ndarray, " example"], by: str | None, seed: int) -> Any:
    generator = np.random.default_rng(seed)
    if by is None:
        return generator.permutation(labels)
    kinds, names = labels_of(columns, by)
    # Balanced over kinds, so that two labels at least occur.
    drawn = generator.permutation(np.arange(len(names)) % max(2, len(np.unique(labels))))
    return drawn[kinds]


def _cross_validated(
    x: Float[np.ndarray, "example feature"],
    y: Int[np.ndarray, " example"],
    folds: int,
    strength: float,
    seed: int,
) -> tuple[Float[np.ndarray, " example"], float]:
    """Return which held-out predictions are right, and the mean accuracy on what was fitted."""
    from sklearn.model_selection import StratifiedKFold

    right, training = np.zeros(len(y)), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y))
    for fitted, held in splits:
        probe = _probe(strength).fit(x[fitted], y[fitted])
        right[held] = probe.predict(x[held]) == y[held]
        training.append(float(probe.score(x[fitted], y[fitted])))
    return right, float(np.mean(training))


def _probe(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))


def _fitted(x: Any, y: Any, strength: float) -> tuple[Any, Any]:
    """Return weight and bias of the probe on all images, for features that are not standardised."""
    pipeline = _probe(strength).fit(x, y)
    scaler, probe = pipeline[0], pipeline[1]
    weight = probe.coef_ / scaler.scale_
    return weight, probe.intercept_ - weight @ scaler.mean_


def _table(
    rows: list[dict[str, Any]], hits: Any, control_hits: Any, chance: float, resamples: int, seed: int
) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    table = table.assign(**interval_columns(hits, name="accuracy", resamples=resamples, seed=seed))
    table = table.assign(
        **interval_columns(control_hits, name="control_accuracy", resamples=resamples, seed=seed)
    )
    selectivity = interval_columns(hits - control_hits, name="selectivity", resamples=resamples, seed=seed)
    return table.assign(**selectivity, chance=chance)


_DESCRIPTION = (
    "A logistic regression is fitted to the activations and scored on images it was not fitted to. Control "
    "labels have the same images and no meaning: what a probe scores on them it owes to itself. Selectivity "
    "is the difference. A property that can be read off an activation need not be used by the model."
)


def _draw(result: CircuitResult, label: str) -> dict[str, Figure]:
    from vit_mechinterp.figures import Curve, curves, dots_by_row

    figures = {}
    for site, rows in result.table.groupby("site", sort=False):
        key = f"accuracy_{site}".replace(".", "_")
        if rows["layer"].isna().any() or len(rows) == 1:
            ends = ["", "_low", "_high"]
            groups = {
                what: {str(site): tuple(float(rows[f"{column}{end}"].iloc[0]) for end in ends)}
                for what, column in (("labels", "accuracy"), ("control labels", "control_accuracy"))
            }
            figures[key] = dots_by_row(groups, label=f"accuracy for {label}")  # type: ignore[arg-type]
            continue
        lines = {
            what: Curve(
                rows["layer"].tolist(),
                rows[column].tolist(),
                rows[f"{column}_low"].tolist(),
                rows[f"{column}_high"].tolist(),
            )
            for what, column in (("labels", "accuracy"), ("control labels", "control_accuracy"))
        }
        chance = {"commonest label": float(rows["chance"].iloc[0])}
        figures[key] = curves(
            lines, x_label=f"layer ({site})", label=f"accuracy for {label}", references=chance
        )
    return figures
