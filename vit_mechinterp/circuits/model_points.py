"""One point per model: how disentangled its objects are, and how often it is right on every split.

The two come from different results, which are matched by the fingerprint of the model that they were measured
on, never by a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vit_mechinterp.circuits.das_figures import by_layer
from vit_mechinterp.circuits.das_rows import NO_CONTROL
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["checked_points", "model_points", "read_results"]

_COLUMNS: Final = ("model", "disentanglement", "split", "accuracy")
_UNMEASURED: Final = "recorded by the training"


def read_results(given: str | Path | Iterable[str | Path | CircuitResult]) -> dict[str, CircuitResult]:
    """Read every result of `das` and `generalization` in a folder and the folders below it, or in a list.

    Returns:
        Where each came from, to the result; results of other circuits are left out.

    Raises:
        DataError: a folder is not there, or none of them holds such a result.
    """
    found: dict[str, CircuitResult] = {}
    for number, one in enumerate([given] if isinstance(given, str | Path) else given):
        if isinstance(one, CircuitResult):
            found[f"result {number} ({one.name})"] = one
            continue
        folder = Path(one)
        if not folder.is_dir():
            raise DataError(
                f"{folder} is no folder. Give a folder that holds results of das and generalization."
            )
        for document in sorted(folder.rglob("result.json")):
            found[str(document.parent)] = CircuitResult.load(document.parent)
    kept = {where: result for where, result in found.items() if result.name in ("das", "generalization")}
    for name in ("das", "generalization"):
        if not any(result.name == name for result in kept.values()):
            raise DataError(
                f"There is no result of {name!r} among {len(found)} results "
                f"({', '.join(sorted({result.name for result in found.values()})) or 'none'}). A point needs "
                "both: das says how disentangled a model is, generalization how often it is right."
            )
    return kept


def model_points(
    results: Mapping[str, CircuitResult], *, splits: Sequence[str], das_split: str | None = None
) -> pd.DataFrame:
    """Return one row per model and split: ``task, model, fingerprint``, the best accuracy over layers of
    every attribute, ``disentanglement`` (their mean; ``..._low`` and ``..._high`` are the means of the ends
    of the attributes' own intervals, wider apart than those of the mean), ``split, accuracy, accuracy_low,
    accuracy_high``.

    Args:
        results: of `das` and `generalization`, by where they came from.
        splits: which accuracies.
        das_split: the split of the search's table; its first if left out.

    Raises:
        DataError: a search has no accuracies of the same model, an attribute was searched twice, or not in
            every model.
    """
    import pandas as pd

    best = _disentanglement(results, das_split)
    _check_attributes(best)
    measured = _accuracies(results)
    rows: list[dict[str, Any]] = []
    for fingerprint, (where, source, found) in best.items():
        own = [row for key, row in measured if key == fingerprint and row["split"] in splits]
        if not own:
            raise DataError(
                f"{where}: no accuracies of this model, {source} (fingerprint {fingerprint[:12]}), on "
                f"{', '.join(splits)}. The accuracies there are belong to "
                f"{_listed(measured)}. Measure generalization on the model that das searched."
            )
        mean, low, high = (sum(values) / len(found) for values in zip(*found.values(), strict=True))
        attributes = {attribute: value for attribute, (value, *_) in found.items()}
        facts = {"fingerprint": fingerprint, **attributes, "disentanglement": mean}
        facts |= {"disentanglement_low": low, "disentanglement_high": high}
        rows += [{"task": row["task"], "model": row["model"], **facts, **row} for row in own]
    return pd.DataFrame(rows)


def checked_points(points: pd.DataFrame) -> pd.DataFrame:
    """Return a table of points that somebody made, with the columns that it may leave out.

    ``model``, ``split``, ``accuracy`` and either ``disentanglement`` or one column per attribute, ``shape``
    and ``color``, whose mean it is.

    Raises:
        DataError: a column is missing or holds something else than finite numbers, or a model occurs twice on
            one split.
    """
    import pandas as pd

    table = points.copy()
    if "disentanglement" not in table and {"shape", "color"} <= set(table.columns):
        table["disentanglement"] = (table["shape"] + table["color"]) / 2
    if missing := [name for name in _COLUMNS if name not in table]:
        raise DataError(
            f"The points lack {', '.join(missing)}; they have {', '.join(table.columns)}. Give model, split, "
            "accuracy, and disentanglement or shape and color."
        )
    for name in ("disentanglement", "accuracy"):
        numbers = pd.to_numeric(table[name], errors="coerce")
        wrong = table[~np.isfinite(numbers)]
        if len(wrong):
            row = wrong.iloc[0]
            raise DataError(
                f"The {name} of {row['model']!r} on split {row['split']!r} is {row[name]!r}; a point takes "
                "two finite numbers."
            )
        table[name] = numbers
    if "task" not in table:
        table.insert(0, "task", "")
    twice = table[table.duplicated(["task", "model", "split"])]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(
            f"The model {row['model']!r} occurs twice on split {row['split']!r}; a model is one point."
        )
    return table


def _disentanglement(
    results: Mapping[str, CircuitResult], das_split: str | None
) -> dict[str, tuple[str, str, dict[str, tuple[float, float, float]]]]:
    """By fingerprint: where the search lies, which model it says it is, and its best accuracies with their
    intervals.
    """
    found: dict[str, tuple[str, str, dict[str, tuple[float, float, float]]]] = {}
    for where, result in results.items():
        if result.name != "das":
            continue
        table = result.table[result.table["control"] == NO_CONTROL]
        if "split" not in table:
            raise DataError(f"{where}: the search's table has no column 'split'. Run das again.")
        known = list(dict.fromkeys(table["split"]))
        split = das_split or next(iter(known), "")
        if split not in known:
            raise DataError(
                f"{where}: the search was not measured on split {split!r}, but on {', '.join(known)}."
            )
        fingerprint = str(result.provenance.get("model"))
        source = str(result.provenance.get("model_source", "of unknown source"))
        _, _, attributes = found.setdefault(fingerprint, (where, source, {}))
        for attribute in dict.fromkeys(table["attribute"].tolist()):
            rows = table[(table["split"] == split) & (table["attribute"] == attribute)]
            if attribute in attributes:
                raise DataError(
                    f"{where}: {attribute} was searched in {source} before, in {found[fingerprint][0]}. Give "
                    "one search per model and attribute."
                )
            layers = by_layer(rows)
            attributes[attribute] = layers[max(layers, key=lambda layer: layers[layer][0])]
    return found


def _check_attributes(best: Mapping[str, tuple[str, str, Mapping[str, Any]]]) -> None:
    """Raise DataError unless the same attributes were searched in every model: a mean over others is another
    quantity.
    """
    every = list(dict.fromkeys(attribute for _, _, found in best.values() for attribute in found))
    for where, source, found in best.values():
        if missing := [attribute for attribute in every if attribute not in found]:
            raise DataError(
                f"{where}: {', '.join(missing)} was not searched in {source}, but in other models. A point "
                f"is the mean over all attributes ({', '.join(every)}): search the same in every model."
            )


def _accuracies(results: Mapping[str, CircuitResult]) -> list[tuple[str, dict[str, Any]]]:
    """Fingerprint and row of every accuracy of one model."""
    found = []
    for where, result in results.items():
        if result.name != "generalization":
            continue
        models = result.provenance.get("models", {})
        for row in result.table[result.table["seed"] != "all"].to_dict("records"):
            name = f"{row['condition']}, seed {row['seed']}"
            fingerprint = models.get(name)
            if fingerprint in (None, _UNMEASURED):
                fingerprint = f"{_UNMEASURED} ({where}: {name})"
            several = result.table[result.table["condition"] == row["condition"]]["seed"].nunique() > 2
            chosen = {key: row[key] for key in ("task", "split", "accuracy", "accuracy_low", "accuracy_high")}
            found.append((str(fingerprint), {"model": name if several else str(row["condition"]), **chosen}))
    return found


def _listed(measured: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    names = {}
    for fingerprint, row in measured:
        unknown = fingerprint.startswith(_UNMEASURED)
        words = f"no fingerprint, {_UNMEASURED}" if unknown else fingerprint[:12]
        names[fingerprint] = f"{row['model']} ({words})"
    return "; ".join(list(names.values())[:6]) or "no model"
