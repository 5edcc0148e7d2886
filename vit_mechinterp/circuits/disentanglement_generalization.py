"""Disentanglement and generalisation: are models whose objects come apart into attributes right more often?

Lepori et al. 2024, section 6 and Fig. 6: one point per model, the mean over shape and colour of the best
interchange accuracy of `das` over layers against the accuracy on every split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vit_mechinterp.circuits.correlation import Correlation, correlation, fisher_interval
from vit_mechinterp.circuits.model_points import checked_points, model_points, read_results
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.errors import SpecError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["disentanglement_generalization"]

_NAMES: Final = {
    "test_iid": "IID",
    "test": "compositional",
    "ood-shape-color": "OOD shape & colour",
}
_SPLITS: Final = tuple(_NAMES)
_TASKS: Final = {"rmts": "RMTS"}


def disentanglement_generalization(
    results: str | Path | Iterable[str | Path | CircuitResult] | pd.DataFrame,
    *,
    splits: Sequence[str] = _SPLITS,
    das_split: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> CircuitResult:
    """Correlate how disentangled models are with how often they are right (Lepori et al. 2024, Fig. 6).

    Args:
        results: a folder that holds, at any depth, results of `das` and of `generalization`; a list of such
            folders or results; or a table of points with the columns ``model, split, accuracy`` and
            ``disentanglement`` (or ``shape`` and ``color``), and ``task`` if there are several.
        splits: the accuracies to correlate with.
        das_split: the split of the searches' accuracies; the first of each if left out.
        resamples: of the bootstrap over models.
        seed: seeds the bootstrap.

    Returns:
        A table of one row per task, split and model: its point (``disentanglement``, the best accuracy of
        each attribute, ``accuracy``), the correlation over all models of the task (``pearson`` with the
        interval by Fisher's transformation, ``pearson_low, pearson_high``, and by the bootstrap,
        ``pearson_bootstrap_low, ..._high``; ``spearman`` with the bootstrap's), ``n_models``, and the same
        without this model (``pearson_without`` with its interval, ``spearman_without``). Figure:
        ``disentanglement_generalization``.

    Raises:
        SpecError: no split is asked for, or an interval cannot be drawn.
        DataError: a folder holds no results, a search has no accuracies of the model with the same
            fingerprint, or there are fewer than three models.
    """
    import pandas as pd

    if not splits:
        raise SpecError(f"Name at least one split to correlate with, such as {', '.join(_SPLITS)}.")
    check_resampling(resamples, seed)
    if isinstance(results, pd.DataFrame):
        points, origins = checked_points(results), []
        points = points[points["split"].isin(list(splits))]
    else:
        found = read_results(results)
        points = checked_points(model_points(found, splits=splits, das_split=das_split))
        origins = [{"models": sorted(set(points["fingerprint"]))}]
    parts = []
    summary: dict[str, float | int | str] = {}
    said = []
    for (task, split), own in points.groupby(["task", "split"], sort=False):
        x, y = own["disentanglement"].to_numpy(), own["accuracy"].to_numpy()
        measured = correlation(x, y, resamples=resamples, seed=seed)
        parts.append(own.assign(**_columns(measured)))
        name = _name(task, split)
        summary[f"Pearson r, {name}"] = measured.pearson
        said.append(_sentence(name, measured, own["model"].tolist()))
    if not parts or max(len(part) for part in parts) < 3:
        raise _too_few(points)
    table = pd.concat(parts, ignore_index=True)
    return CircuitResult(
        name="disentanglement_generalization",
        title="Disentanglement and generalisation",
        table=table,
        provenance=provenance(
            *origins, splits=list(splits), das_split=das_split, resamples=resamples, seed=seed
        ),
        summary={**summary, "models": int(points.groupby("task")["model"].nunique().max())},
        description=f"{_DESCRIPTION}\n\n{' '.join(said)}",
        captions={
            "disentanglement_generalization": (
                "One point per model: the mean over attributes of the best interchange accuracy over layers, "
                "against accuracy. Lines are 95 % intervals, upright over images, across the mean over "
                "attributes of those over pairs (wider than that of the mean). r is Pearson's correlation, "
                "with its 95 % interval by Fisher's transformation, and its range when each model is left "
                "out in turn."
            )
        },
        draw=_draw,
    )


_DESCRIPTION: Final = (
    "A model is disentangled if distributed alignment search finds, in its best layer, subspaces that carry "
    "shape and colour apart. Each model is one point; the models are few, so that one of them can make a "
    "correlation, and every coefficient is also given without each.\n\n"
    'After Lepori et al. 2024, "Beyond the Doors of Perception".'
)


def _columns(found: Correlation) -> dict[str, Any]:
    without = [fisher_interval(r, found.n - 1) for r in found.pearson_without]
    return {
        "pearson": found.pearson,
        "pearson_low": found.fisher[0],
        "pearson_high": found.fisher[1],
        "pearson_bootstrap_low": found.pearson_bootstrap[0],
        "pearson_bootstrap_high": found.pearson_bootstrap[1],
        "spearman": found.spearman,
        "spearman_low": found.spearman_bootstrap[0],
        "spearman_high": found.spearman_bootstrap[1],
        "n_models": found.n,
        "pearson_without": found.pearson_without,
        "pearson_without_low": [low for low, _ in without],
        "pearson_without_high": [high for _, high in without],
        "spearman_without": found.spearman_without,
    }


def _sentence(name: str, found: Correlation, models: Sequence[str]) -> str:
    label = name[0].upper() + name[1:]
    if np.isnan(found.pearson):
        return f"{label}: no correlation over {found.n} models (fewer than three, or no variation)."
    text = f"{label}: r = {found.pearson:.2f}{_span(found.fisher)}, rank correlation {found.spearman:.2f}"
    without = np.array(found.pearson_without)
    if np.isnan(without).all():
        return f"{text}, over {found.n} models."
    least = int(np.nanargmin(without))
    return f'{text}; lowest without "{models[least]}", {without[least]:.2f} ({found.n} models).'


def _name(task: Any, split: Any, one_task: bool = False) -> str:
    """What is correlated, in a reader's words."""
    words = _NAMES.get(str(split), str(split))
    return words if one_task or not task else f"{_TASKS.get(str(task), str(task))}, {words}"


def _span(ends: tuple[float, float]) -> str:
    return "" if np.isnan(ends[0]) else f" [{ends[0]:.2f}, {ends[1]:.2f}]"


def _too_few(points: pd.DataFrame) -> Exception:
    from vit_mechinterp.errors import DataError

    names = ", ".join(dict.fromkeys(points["model"])) if len(points) else "none"
    return DataError(f"A correlation takes at least three models on one split; here are {names}.")


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures.labelled_points import Points, labelled_points

    panels = {}
    one_task = result.table["task"].nunique() == 1
    for (task, split), own in result.table.groupby(["task", "split"], sort=False):
        first = own.iloc[0]
        note = f"r = {first['pearson']:.2f}{_span((first['pearson_low'], first['pearson_high']))}"
        without = own["pearson_without"].to_numpy(dtype=float)
        if not np.isnan(without).all():
            note += f"\nwithout one: {np.nanmin(without):.2f} to {np.nanmax(without):.2f}"
        low, high = (own.get(f"accuracy_{end}", own["accuracy"]).tolist() for end in ("low", "high"))
        x, y = own["disentanglement"].tolist(), own["accuracy"].tolist()
        ends = [f"disentanglement_{end}" for end in ("low", "high")]
        across = [own[name].tolist() if name in own else [] for name in ends]
        panels[_name(task, split, one_task)] = Points(own["model"].tolist(), x, y, low, high, note, *across)
    figure = labelled_points(
        panels, x_label="best interchange accuracy,\nmean over attributes", y_label="accuracy"
    )
    return {"disentanglement_generalization": figure}
