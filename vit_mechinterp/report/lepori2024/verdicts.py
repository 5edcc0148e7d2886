"""The paper's statements, each held against what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vit_mechinterp.circuits.attention_stages import peak_heads
from vit_mechinterp.circuits.correlation import pearson
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.report.lepori2024.claims import Claim, by_layer
from vit_mechinterp.report.lepori2024.other_verdicts import OTHER_CLAIMS
from vit_mechinterp.report.lepori2024.published import best, published
from vit_mechinterp.report.lepori2024.table_verdicts import TABLE_CLAIMS

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
            "the background",
            "",
            f"the largest shares are {found}",
            "no peak lies before the one that it follows, and they are not all in one layer",
            values == sorted(values) and len(set(values)) > 1,
        )
        heat = table.groupby("layer")["heat"].mean()
        half = len(heat) // 2
        early, late = heat.iloc[:half].mean(), heat.iloc[half:].mean()
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


def _no_stages(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
    peaks = peak_heads(results["attention_rmts_dino"].table)
    layers = [peaks[kind][0] for kind in ("WO", "WP", "BP", "BG")]
    yield Claim(
        "Fig. 2 (RMTS)",
        "DINO shows no such order of stages",
        "",
        "the largest shares are " + ", ".join(f"{kind} in layer {peaks[kind][0]}" for kind in peaks),
        "the peaks of WO, WP, BP, BG do not follow one another",
        layers != sorted(layers),
    )


def _photographs(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
    realistic, synthetic = "attention_realistic_discrimination", "attention_discrimination"
    yield from _stages(realistic, "Fig. 10", ("WO", "WP", "BG"))(results)
    if synthetic in results:
        there, here = (int((results[name].table["heat"] < 0.5).sum()) for name in (synthetic, realistic))
        yield Claim(
            "Fig. 10",
            "on photographs fewer heads are local",
            "",
            f"{here} of {len(results[realistic].table)} heads have a global score below 0.5, {there} on the "
            "stimuli",
            "there are fewer",
            here < there,
        )


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
        if "split" in table:  # the first is of known objects
            table = table[table["split"] == table["split"].iloc[0]]
        for attribute, rows in table.groupby("attribute", sort=False):
            value, layer = best(
                item="fig3", task=task, kind=attribute, quantity="interchange accuracy", model=_CLIP
            )
            searched = by_layer(rows[rows["control"] == "none"], "accuracy")
            top, end = max(searched, key=lambda n: searched[n]), max(searched)
            yield Claim(
                figure,
                f"a subspace of early layers carries {attribute}, and late ones have none that matters",
                f"{value:.3f} in layer {layer} ({_LOGGED}); {_last(task, str(attribute)):.3f} in the last",
                f"{searched[top]:.3f} in layer {top}; {searched[end]:.3f} in layer {end}, the last",
                "the best layer is above 0.75 and not the last, and the last is below 0.5",
                bool(searched[top] > 0.75 and top < end and searched[end] < 0.5),
            )
            control = by_layer(rows[rows["control"] == "wrong_object"], "accuracy")
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
                str(method): max(by_layer(own, "accuracy").values())
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
    probe = by_layer(of["probe accuracy"], "value")
    top = of["success"].iloc[int(of["success"]["value"].argmax())]
    alpha, layer, reached = float(top["alpha"]), int(top["layer"]), float(top["value"])
    success, control = (
        by_layer(rows[rows["alpha"] == alpha], "value") for rows in (of["success"], of["control"])
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
            if math.isnan(first["pearson"]):
                found = f"no correlation over {first['n_models']} models: one of the two does not vary"
            elif first["n_models"] > 3:
                found += (
                    f" [{first['pearson_low']:.2f}, {first['pearson_high']:.2f}]; "
                    f"{rows['pearson_without'].min():.2f} to {rows['pearson_without'].max():.2f} without one "
                    "of them"
                )
            else:
                found += ", too few for an interval"
            yield Claim(
                "Fig. 6" if task == "discrimination" else "Fig. 6 (RMTS)",
                f"models whose attributes come apart are right more often ({_SPLITS.get(str(split), split)})",
                _logged_correlation(task, str(split)),
                found,
                "the interval lies above 0; where it contains 0, it cannot be told",
                bool(first["pearson"] > 0) if first["pearson_low"] > 0 or first["pearson_high"] < 0 else None,
            )

    return of


_SPLITS = {"test_iid": "IID", "test": "compositional", "ood-shape-color": "OOD shape & colour"}


def _logged_correlation(task: str, split: str) -> str:
    """The coefficient that follows from the logs of the models trained on 32 combinations."""
    best_of = published(item="fig6", task=task, combinations=32, quantity="best interchange accuracy")
    right = published(item="accuracy", task=task, combinations=32, kind=split).set_index("model")["value"]
    means = best_of.groupby("model")["value"].mean()
    both = [model for model in means.index if model in right.index]
    r = pearson(means[both].to_numpy(), right[both].to_numpy())
    return f"r = {r:.2f} over {len(both)} models, from the authors' logs"


_CLAIMS: Mapping[str, Any] = {
    **TABLE_CLAIMS,
    "attention_discrimination": _stages("attention_discrimination", "Fig. 2", ("WO", "WP", "BG")),
    "attention_discrimination_scratch": _scratch,
    "attention_rmts": _stages("attention_rmts", "Fig. 2 (RMTS)", ("WO", "WP", "BP", "BG")),
    "attention_rmts_dino": _no_stages,
    "attention_realistic_discrimination": _photographs,
    "das_discrimination": _das("discrimination", "Fig. 3"),
    "das_rmts": _das("rmts", "Fig. 3 (RMTS)"),
    "novel_discrimination": _novel("discrimination", "Fig. 4"),
    "novel_rmts": _novel("rmts", "Fig. 29"),
    "probe_rmts": _probe,
    "points_discrimination": _points("discrimination"),
    "points_rmts": _points("rmts"),
    **OTHER_CLAIMS,
}
