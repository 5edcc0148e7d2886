"""What the paper's tables say, held against our accuracies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.report.lepori2024.cast import ABOVE_CHANCE
from vit_mechinterp.report.lepori2024.claims import Claim
from vit_mechinterp.report.lepori2024.published import published
from vit_mechinterp.report.lepori2024.tables import TABLES

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TABLE_CLAIMS"]

Claims = Callable[[Mapping[str, CircuitResult]], Iterator[Claim]]

_NEAR: Final = 0.05
_SPLITS: Final = {"test_iid": "IID", "test": "compositional", "ood-shape-color": "OOD shape & colour"}
_SAID: Final = {
    "disentanglement": "the disentanglement loss",
    "pipeline": "the pipeline loss",
    "both": "both losses together",
}
_LOGGED: Final = {
    ("discrimination", "disentanglement"): "scratch B/16: 0.805 without, 0.958 with; B/32: 0.884, 0.991",
    ("rmts", "disentanglement"): "scratch B/32: 0.500 without, 0.503 with",
}


def _auxiliary(task: str) -> Claims:
    """Table 1: the same model with and without auxiliary losses. On discrimination either helps; relational
    match to sample takes both.
    """

    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        rows = _whole(results[f"accuracy_{task}"].table)
        iid = rows[rows["split"] == "test_iid"]
        several = iid[["model", "combinations"]].drop_duplicates().shape[0] > 1
        for (model, combinations), own in iid.groupby(["model", "combinations"], sort=False):
            # Of several trainings with the same losses the better one speaks for them.
            top = own.loc[own.groupby("losses", sort=False)["accuracy"].idxmax()]
            best = {str(row["losses"]): row for _, row in top.iterrows()}
            if "none" not in best:
                continue
            plain = best["none"]
            whose = f" ({model}, {combinations})" if several else ""
            for losses, said in _SAID.items():
                if losses not in best:
                    continue
                row = best[losses]
                effect, rule, holds = _effect(task, losses, float(row["accuracy"]), float(plain["accuracy"]))
                yield Claim(
                    "Table 1" if task == "discrimination" else "Table 1 (RMTS)",
                    f"{said} {effect}{whose}",
                    _LOGGED.get((task, losses), ""),
                    f"{_mean(plain)}{_started(plain)} without, {_mean(row)}{_started(row)} with",
                    rule,
                    holds,
                )

    return of


def _effect(task: str, losses: str, accuracy: float, plain: float) -> tuple[str, str, bool]:
    """What the paper says of losses, when that holds, and whether it does."""
    more = "accuracy on known objects is higher by more than 0.01"
    if task == "rmts" and losses != "both":
        said = "alone does not teach a model that is trained from scratch"
        return said, f"accuracy on known objects stays at {ABOVE_CHANCE:g} or below", accuracy <= ABOVE_CHANCE
    if task == "rmts":
        holds = accuracy > max(plain + 0.01, ABOVE_CHANCE)
        return "teach a model that is trained from scratch", f"{more}, and above {ABOVE_CHANCE:g}", holds
    verb = "help" if losses == "both" else "helps"
    return f"{verb} a model that is trained from scratch", more, accuracy > plain + 0.01


def _started(row: pd.Series[Any]) -> str:
    """That a model began with the weights of another, if it did."""
    words = str(row["pretraining"])
    return f" ({words})" if words.startswith("starts from") else ""


def _photographs(section: str, figure: str) -> Claims:
    """What becomes of accuracies on realistic images."""

    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        rows = _whole(results[section].table)
        by_split = rows.pivot_table(index="condition", columns="split", values="accuracy", sort=False)
        models = dict(zip(rows["condition"], rows["model"], strict=True))
        if "realistic" not in by_split:
            return
        clip = [name for name in by_split.index if str(models[name]).startswith("CLIP")]
        others = [name for name in by_split.index if name not in clip]
        kept, lower = "none loses more than 0.1", "all lose more than 0.1"
        for names, said, rule in (
            (clip, "on photographs CLIP is right nearly as often", kept),
            (others, "on photographs models other than CLIP are right much less often", lower),
        ):
            if names:
                lost = by_split.loc[names, "test_iid"] - by_split.loc[names, "realistic"]
                here = ", ".join(f"{name} {by_split.loc[name, 'realistic']:.3f}" for name in names)
                holds = bool((lost <= 0.1).all() if rule is kept else (lost > 0.1).all())
                yield Claim(figure, said, "", here, rule, holds)

    return of


def _both(*claims: Claims) -> Claims:
    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        for one in claims:
            yield from one(results)

    return of


def _mean(row: pd.Series[Any]) -> str:
    seeds = f" (mean of {row['n_seeds']} seeds)" if row["n_seeds"] > 1 else ""
    return f"{row['accuracy']:.3f}{seeds}"


def _logged(section: str, figure: str) -> Claims:
    """A table beside the authors' logs: every row that they have."""

    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        rows = _whole(results[section].table)
        for condition, own in rows.groupby("condition", sort=False):
            first = own.iloc[0]
            name = str(condition)
            name = name if str(first["model"]) in name else f"{first['model']}, {name}"
            theirs = published(
                item="accuracy",
                model=_in_logs(str(first["model"]), str(first["losses"])),
                task=first["task"],
                combinations=256 if first["combinations"] == "256-256-256" else 32,
            )
            kinds, values = theirs["kind"].astype(str), theirs["value"].astype(float)
            logged = dict(zip(kinds, values, strict=True))
            ours = dict(zip(own["split"], own["accuracy"], strict=True))
            both = [split for split in _SPLITS if split in logged and split in ours]
            if not both:
                continue
            yield Claim(
                figure,
                f"{name} is right on new images about as often as there",
                ", ".join(f"{_SPLITS[split]} {logged[split]:.3f}" for split in both) + " (logged)",
                ", ".join(f"{_SPLITS[split]} {ours[split]:.3f}" for split in both),
                f"IID and compositional accuracy differ by no more than {_NEAR:g}",
                all(abs(ours[split] - logged[split]) <= _NEAR for split in both if split.startswith("test")),
            )

    return of


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """The rows over all seeds."""
    return table[table["seed"] == "all"]


def _in_logs(model: str, losses: str) -> str:
    """What the logs call a model."""
    name = model.replace("from scratch, ", "scratch ").replace("ViT-", "")
    return name if losses == "none" else f"{name}, {losses} loss"


def _figure_of(figure: str) -> str:
    if figure.startswith("table_"):
        return f"RMTS, {figure.rpartition('_')[2]}"
    return figure.replace("table", "Table ")


TABLE_CLAIMS: Final[Mapping[str, Claims]] = {
    "accuracy_discrimination": _both(
        _auxiliary("discrimination"),
        _logged("accuracy_discrimination", "Table 1"),
        _photographs("accuracy_discrimination", "Fig. 10"),
    ),
    "accuracy_rmts": _both(_auxiliary("rmts"), _logged("accuracy_rmts", "Table 1 (RMTS)")),
    **{section: _logged(section, _figure_of(figure)) for figure, section in TABLES.items()},
    TABLES["table2"]: _both(
        _logged(TABLES["table2"], "Table 2"), _photographs(TABLES["table2"], "Table 2")
    ),
}
