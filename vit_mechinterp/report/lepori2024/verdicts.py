"""The paper's statements, each held against what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vit_mechinterp.circuits.attention_stages import peak_heads
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.report.lepori2024.claims import Claim
from vit_mechinterp.report.lepori2024.published import best, published

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["verdicts"]

_CLIP = "CLIP B/16"
_LOGGED = "logged for CLIP B/16"


def verdicts(results: Mapping[str, CircuitResult]) -> list[Claim]:
    """Return what the paper says of every section that was made."""
    claims: list[Claim] = []
    for name, of in _CLAIMS.items():
        if name in results:
            claims += of(results)
    return claims


def _stages(name: str, figure: str, order: tuple[str, ...]) -> Any:
    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        table = results[name].table
        peaks = peak_heads(table)
        layers = {kind: peaks[kind][0] for kind in order}
        found = ", ".join(f"{kind} in layer {layer}" for kind, layer in layers.items())
        values = list(layers.values())
        yield Claim(
            figure,
            f"attention peaks in the order {', '.join(order)}: within objects, then between them, then on "
            "the "
            "background",
            "",
            f"the largest shares are {found}",
            "no peak lies before the one that it follows, and they are not all in one layer",
            values == sorted(values) and len(set(values)) > 1,
        )
        by_layer = table.groupby("layer")["heat"].mean()
        half = len(by_layer) // 2
        early, late = by_layer.iloc[:half].mean(), by_layer.iloc[half:].mean()
        yield Claim(
            figure,
            "heads are local in early layers and global in late ones",
            "",
            f"the mean global score is {early:.2f} in the first half of the layers and {late:.2f} in the "
            "second",
            "the second half is the more global one",
            bool(early < late),
        )

    return of


def _scratch(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
    name = "attention_discrimination"
    shares = {part: results[part].table["WO_direct"] for part in (f"{name}_scratch", name) if part in results}
    local = {part: int((share > 0.5).sum()) for part, share in shares.items()}
    plain, heads = local[f"{name}_scratch"], len(shares[f"{name}_scratch"])
    beside = f", {local[name]} in the model of the other sections" if name in local else ""
    yield Claim(
        "Fig. 2",
        "a model trained from scratch has hardly any head that attends within objects",
        "",
        f"{plain} of {heads} heads give more than half of an object's attention to itself without auxiliary "
        f"loss{beside}",
        "at most one head in ten does",
        plain <= heads / 10,
    )


def _das(task: str, figure: str) -> Any:
    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        table = results[f"das_{task}"].table
        for attribute, rows in table.groupby("attribute", sort=False):
            value, layer = best(
                item="fig3", task=task, kind=attribute, quantity="interchange accuracy", model=_CLIP
            )
            searched = _by_layer(rows[rows["control"] == "none"], "accuracy")
            top, end = max(searched, key=lambda n: searched[n]), max(searched)
            yield Claim(
                figure,
                f"a subspace of early layers carries {attribute}, and late ones have none that matters",
                f"{value:.3f} in layer {layer} ({_LOGGED}); {_last(task, str(attribute)):.3f} in the last",
                f"{searched[top]:.3f} in layer {top}; {searched[end]:.3f} in layer {end}, the last",
                "the best layer is above 0.75 and not the last, and the last is below 0.5",
                bool(searched[top] > 0.75 and top < end and searched[end] < 0.5),
            )
            control = _by_layer(rows[rows["control"] == "wrong_object"], "accuracy")
            if top in control:
                yield Claim(
                    figure,
                    f"taking the wrong object's {attribute} does not do it",
                    _wrong(task, str(attribute), layer),
                    f"{control[top]:.3f} in layer {top}",
                    "the control is below 0.6 and the search above it",
                    bool(control[top] < 0.6 < searched[top]),
                )

    return of


def _by_layer(rows: pd.DataFrame, column: str) -> dict[int, float]:
    """Means by layer."""
    means = rows.groupby("layer")[column].mean()
    return {int(str(layer)): float(value) for layer, value in means.items()}


def _last(task: str, attribute: str) -> float:
    rows = published(item="fig3", task=task, kind=attribute, quantity="interchange accuracy", model=_CLIP)
    return float(rows["value"].iloc[-1])


def _wrong(task: str, attribute: str, layer: str) -> str:
    rows = published(item="fig3", task=task, kind=attribute, quantity="wrong object", layer=layer)
    return f"{float(rows['value'].iloc[0]):.3f} in layer {layer}" if len(rows) else ""


def _novel(task: str, figure: str) -> Any:
    item = figure.replace("Fig. ", "fig")

    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        table = results[f"novel_{task}"].table
        table = table[table["space"] == "subspace"]
        for attribute, rows in table.groupby("attribute", sort=False):
            tops = {
                str(method): max(_by_layer(own, "accuracy").values())
                for method, own in rows.groupby("method", sort=False)
            }
            logged = {method: _best_novel(item, str(attribute), method) for method in tops}
            yield Claim(
                figure,
                f"the decision takes {attribute} vectors that were made by adding two known ones better than "
                "vectors drawn at random",
                _listed(logged),
                _listed(tops),
                "added vectors lead by more than 0.1 in their best layers",
                bool(tops["added"] > tops["random"] + 0.1),
            )
            yield Claim(
                figure,
                f"random vectors in the subspace of {attribute} leave the answer at chance",
                f"random {logged['random']:.3f}" if logged["random"] is not None else "",
                f"random {tops['random']:.3f} in its best layer",
                "the best layer is below 0.6",
                bool(tops["random"] < 0.6),
            )

    return of


def _best_novel(item: str, attribute: str, method: str) -> float | None:
    rows: pd.DataFrame = published(item=item, kind=attribute, quantity=method)
    return float(rows["value"].max()) if len(rows) else None


def _listed(values: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)


def _probe(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
    table = results["probe_rmts"].table
    whole = table[table["pair"] == "all"] if (table["pair"] == "all").any() else table
    of = {str(quantity): rows for quantity, rows in whole.groupby("quantity")}
    probe = _by_layer(of["probe accuracy"], "value")
    top = of["success"].iloc[int(of["success"]["value"].argmax())]
    alpha, layer, reached = float(top["alpha"]), int(top["layer"]), float(top["value"])
    success, control = (
        _by_layer(rows[rows["alpha"] == alpha], "value") for rows in (of["success"], of["control"])
    )
    read_in = max(probe, key=lambda n: probe[n])
    logged, where = best(item="fig5", model=_CLIP, combinations=256, quantity="intervention success, alpha 1")
    read, at = best(item="fig5", model=_CLIP, combinations=256, quantity="probe accuracy")
    last = success[max(success)]
    yield Claim(
        "Fig. 5",
        "from the middle layers on, the relation of a pair can be read from its tokens",
        f"{read:.3f} in layer {at} ({_LOGGED})",
        f"{probe[read_in]:.3f} in layer {read_in}, {probe[0]:.3f} in the first",
        "the best layer is above 0.75, and 0.1 above the first",
        probe[read_in] > 0.75 and probe[read_in] > probe[0] + 0.1,
    )
    yield Claim(
        "Fig. 5",
        "turning it round there turns the answer round, and no longer in the last layers",
        f"{logged:.3f} in layer {where}",
        f"{reached:.3f} in layer {layer} with alpha {alpha:g} (control {control[layer]:.3f}); "
        f"{last:.3f} in the last",
        "the best success is above 0.6, and 0.2 above its control and above the last layer",
        reached > 0.6 and reached > control[layer] + 0.2 and last < reached - 0.2,
    )


def _points(task: str) -> Any:
    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        table = results[f"points_{task}"].table
        for split, rows in table.groupby("split", sort=False):
            first = rows.iloc[0]
            found = f"r = {first['pearson']:.2f} over {first['n_models']} models"
            if first["n_models"] > 3:
                found += (
                    f" [{first['pearson_low']:.2f}, {first['pearson_high']:.2f}]; "
                    f"{rows['pearson_without'].min():.2f} to {rows['pearson_without'].max():.2f} without one "
                    "of them"
                )
            else:
                found += ", too few for an interval"
            yield Claim(
                "Fig. 6",
                f"models whose attributes come apart are right more often ({split})",
                "",
                found,
                "the interval lies above 0; where it contains 0, it cannot be told",
                bool(first["pearson"] > 0) if first["pearson_low"] > 0 or first["pearson_high"] < 0 else None,
            )

    return of


def _accuracy(task: str) -> Any:
    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        table = results[f"accuracy_{task}"].table
        iid = table[(table["split"] == "test_iid") & (table["seed"] == "all")].set_index("condition")
        value = {_losses(str(name)): row["accuracy"] for name, row in iid.iterrows()}
        if "none" not in value:
            return
        plain = value["none"]
        for losses, published_text in _AUXILIARY[task].items():
            if losses in value:
                yield Claim(
                    "Table 1",
                    _SAID[losses] if task == "discrimination" else f"{_SAID[losses]} (RMTS)",
                    published_text,
                    f"{plain:.3f} without, {value[losses]:.3f} with",
                    "accuracy on known objects is higher by more than 0.01",
                    bool(value[losses] > plain + 0.01),
                )

    return of


def _losses(condition: str) -> str:
    for name in ("disentanglement", "pipeline", "both"):
        if name in condition:
            return name
    return "none" if "no auxiliary" in condition else condition


_SAID = {
    "disentanglement": "the disentanglement loss helps a model that is trained from scratch",
    "pipeline": "the pipeline loss helps a model that is trained from scratch",
    "both": "both losses together help a model that is trained from scratch",
}
_AUXILIARY: Mapping[str, Mapping[str, str]] = {
    "discrimination": {
        "disentanglement": "scratch B/16: 0.805 without, 0.958 with; B/32: 0.884, 0.991",
        "pipeline": "",
        "both": "",
    },
    "rmts": {"disentanglement": "scratch B/32: 0.500 without, 0.503 with", "pipeline": "", "both": ""},
}

_CLAIMS: Mapping[str, Any] = {
    "accuracy_discrimination": _accuracy("discrimination"),
    "accuracy_rmts": _accuracy("rmts"),
    "attention_discrimination": _stages("attention_discrimination", "Fig. 2", ("WO", "WP", "BG")),
    "attention_discrimination_scratch": _scratch,
    "attention_rmts": _stages("attention_rmts", "Fig. 2 (RMTS)", ("WO", "WP", "BP", "BG")),
    "attention_realistic_discrimination": _stages(
        "attention_realistic_discrimination", "Fig. 10", ("WO", "WP", "BG")
    ),
    "das_discrimination": _das("discrimination", "Fig. 3"),
    "das_rmts": _das("rmts", "Fig. 3 (RMTS)"),
    "novel_discrimination": _novel("discrimination", "Fig. 4"),
    "novel_rmts": _novel("rmts", "Fig. 29"),
    "probe_rmts": _probe,
    "points_discrimination": _points("discrimination"),
    "points_rmts": _points("rmts"),
}
