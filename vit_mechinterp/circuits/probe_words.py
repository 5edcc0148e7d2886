"""The table, the words and the figures of probe and intervention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_mechinterp.circuits.backdrop import BACKDROP
from vit_mechinterp.circuits.probe_sites import PairSites
from vit_mechinterp.circuits.reading import interval_columns
from vit_mechinterp.circuits.result import CircuitResult

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool
    from matplotlib.figure import Figure

__all__ = ["captions", "description", "draw", "findings", "measured_table"]

ALL = "all"
PROBE, SUCCESS, CONTROL = "probe accuracy", "success", "control"


def measured_table(
    places: PairSites,
    pairs: Sequence[str],
    right: Mapping[tuple[str, int], Bool[np.ndarray, " image"]],
    turned: Mapping[tuple[str, int, float, str], Bool[np.ndarray, " image"]],
    before: Bool[np.ndarray, " image"],
    lengths: Mapping[int, float],
    heat: Sequence[float] | None,
    *,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    """Return the long table; ``all`` is the mean of the pairs of an image, so images are resampled whole.

    Args:
        places: the sites.
        pairs: names of the pairs.
        right: pair and layer to where the probe is right.
        turned: pair, layer, strength and quantity to where the answer is ``1 - label``.
        before: where it is so without an intervention.
        lengths: layer to the length of its probe's rows, as a multiple of the activations'.
        heat: global score of every layer of the model.
        resamples, seed: of the bootstrap.
    """
    import pandas as pd

    series: dict[tuple[str, int, float, str], Any] = {
        (pair, layer, float("nan"), PROBE): values for (pair, layer), values in right.items()
    }
    series |= turned
    by_place: dict[tuple[str, int, str], list[Any]] = {}
    for (_, layer, alpha, quantity), values in series.items():
        by_place.setdefault((quantity, layer, str(alpha)), []).append(values)
    rows, values = [], []
    for (pair, layer, alpha, quantity), own in series.items():
        places_of = [(pair, own)]
        together = by_place[quantity, layer, str(alpha)]
        if len(pairs) > 1 and pair == pairs[0]:
            places_of.append((ALL, np.mean(together, axis=0)))
        for name, numbers in places_of:
            rows.append(
                {
                    "layer": layer,
                    "site": places.probed[layer],
                    "intervention_site": places.changed[layer],
                    "alpha": alpha,
                    "pair": name,
                    "quantity": quantity,
                }
            )
            values.append(np.asarray(numbers, dtype=float))
    table = pd.DataFrame(rows).assign(
        **interval_columns(np.stack(values), resamples=resamples, seed=seed),
        n=len(before),
        no_effect=float(np.mean(before)),
    )
    table["relative_length"] = table["alpha"] * table["layer"].map(lengths)
    if heat is not None:
        table = table.assign(global_score=[heat[layer] for layer in table["layer"]])
    order = {name: index for index, name in enumerate([PROBE, SUCCESS, CONTROL, *pairs, ALL])}
    keys = table.assign(q=table["quantity"].map(order), p=table["pair"].map(order))
    sorted_rows = keys.sort_values(["layer", "q", "alpha", "p"]).index
    found: pd.DataFrame = table.loc[sorted_rows].reset_index(drop=True)
    return found


def pooled(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows over all pairs."""
    return table[table["pair"] == (ALL if ALL in set(table["pair"]) else table["pair"].iloc[0])]


def findings(table: pd.DataFrame) -> tuple[dict[str, float | int | str], str]:
    """Return the few numbers of a summary, and what was found in words."""
    rows = pooled(table)
    probe = rows[rows["quantity"] == PROBE]
    best = probe.iloc[int(probe["value"].argmax())]
    no_effect = float(table["no_effect"].iloc[0])
    summary: dict[str, float | int | str] = {
        "images": int(table["n"].iloc[0]),
        f"best probe accuracy, layer {best['layer']}": float(best["value"]),
        "no effect": no_effect,
    }
    said = [
        f"The relation is read best in layer {best['layer']}: {best['value']:.0%} of the pairs rightly. "
        f"Without an intervention the model gives the opposite answer to {no_effect:.0%} of the images."
    ]
    for alpha, own in rows[rows["quantity"] == SUCCESS].groupby("alpha"):
        top = own.iloc[int(own["value"].argmax())]
        layer = top["layer"]
        controls = rows[(rows["quantity"] == CONTROL) & (rows["alpha"] == alpha)]
        by_layer = controls.set_index("layer")["value"]
        control = float(by_layer[layer])
        lead = own.set_index("layer")["value"] - by_layer
        ahead = int(lead.index[int(lead.argmax())])
        last = own[own["layer"] == own["layer"].max()].iloc[0]
        read = float(probe[probe["layer"] == last["layer"]]["value"].iloc[0])
        summary[f"best success, alpha {alpha:g}, layer {layer}"] = float(top["value"])
        summary[f"control there, alpha {alpha:g}"] = control
        summary[f"largest lead over the control, alpha {alpha:g}, layer {ahead}"] = float(lead[ahead])
        clear = float(top["value_low"]) > no_effect
        said.append(
            f"Alpha {alpha:g}: adding the opposite relation leads to the opposite answer most often in layer "
            f"{layer}, on {top['value']:.0%} of the images (control {control:.0%}"
            f"{'' if clear else '; within the noise of no effect'}); its lead over the control is largest in "
            f"layer {ahead} ({lead[ahead]:+.0%}). In the last layer, {last['layer']}, the opposite answer is "
            f"given to {last['value']:.0%}, and the probe reads {read:.0%}."
        )
    return summary, " ".join(said)


_DESCRIPTION = (
    "At every layer a linear probe reads from {site}, at the tokens of both objects of a pair one after the "
    "other, whether they are the same. Then alpha times the probe's row for the opposite relation is added "
    "{at} at the tokens of one pair, and the rest of the model runs on. It succeeds if the model then gives "
    "the opposite of the right answer. The control adds the row of the pair's own relation; where it turns "
    "answers too, the direction only disturbs the model. Where a relation can be read but does not turn the "
    "answer, the model no longer goes on from it, or never did."
)


def description(places: PairSites) -> str:
    """Say what was done."""
    site = places.probed[places.layers[0]].split(".", 2)[-1]
    return _DESCRIPTION.format(
        site=site, at=f"to {places.intervene_at} of the same block" if places.apart else "there"
    )


def captions(table: pd.DataFrame, places: PairSites) -> dict[str, str]:
    """Say what each figure shows."""
    several = ALL in set(table["pair"])
    alphas = _alphas(table)
    where = "at the same site" if not places.apart else f"at {places.intervene_at}"
    tint = BACKDROP if "global_score" in table else ""
    bars = f"Tints: 95 % bootstrap intervals over {int(table['n'].iloc[0])} images."
    made = {}
    for alpha in alphas:
        made[f"alpha_{alpha:g}"] = (
            "Accuracy of the probe for a pair's relation; opposite answers after adding its direction of the "
            f"opposite relation {where} (success), and of the pair's own (control), alpha {alpha:g}"
            f"{'; means over the pairs' if several else ''}. Dotted: chance of the probe, and opposite "
            f"answers without an intervention. {bars}{tint}"
        )
        if several:
            made[f"pairs_alpha_{alpha:g}"] = f"The same by the pair that is changed. {bars}{tint}"
    if len(alphas) > 1:
        made["alphas"] = f"Opposite answers at every strength of the direction. {bars}{tint}"
    return made


def draw(result: CircuitResult) -> dict[str, Figure]:
    """Draw every strength, the pairs apart, and the strengths together; layers left out are gaps."""
    table = result.table
    rows = pooled(table)
    success, control = "intervention success", "control"
    no_effect = {"no effect": float(table["no_effect"].iloc[0])}
    figures = {}
    for alpha in _alphas(table):
        at = rows[rows["alpha"] == alpha]
        lines = {
            "probe accuracy": rows[rows["quantity"] == PROBE],
            success: at[at["quantity"] == SUCCESS],
            control: at[at["quantity"] == CONTROL],
        }
        figures[f"alpha_{alpha:g}"] = _figure(table, lines, "accuracy, success", {"chance": 0.5, **no_effect})
        if ALL in set(table["pair"]):
            own = table[(table["alpha"] == alpha) & (table["pair"] != ALL)]
            by_pair = {
                f"{pair}{'' if quantity == SUCCESS else ', control'}": own[
                    (own["pair"] == pair) & (own["quantity"] == quantity)
                ]
                for quantity in (SUCCESS, CONTROL)
                for pair in dict.fromkeys(own["pair"])
            }
            figures[f"pairs_alpha_{alpha:g}"] = _figure(table, by_pair, success, no_effect)
    if len(_alphas(table)) > 1:
        strengths = {
            f"alpha {alpha:g}": rows[(rows["alpha"] == alpha) & (rows["quantity"] == SUCCESS)]
            for alpha in _alphas(table)
        }
        figures["alphas"] = _figure(table, strengths, success, no_effect)
    return figures


def _figure(
    table: pd.DataFrame, lines: Mapping[str, pd.DataFrame], label: str, references: Mapping[str, float]
) -> Figure:
    from vit_mechinterp.figures import lines_by_layer

    every = range(int(table["layer"].max()) + 1)

    def by_layer(rows: pd.DataFrame, column: str) -> list[float]:
        values = dict(zip(rows["layer"], rows[column], strict=True))
        return [float(values.get(layer, "nan")) for layer in every]

    return lines_by_layer(
        {name: by_layer(rows, "value") for name, rows in lines.items()},
        label=label,
        references=references,
        bands={name: (by_layer(r, "value_low"), by_layer(r, "value_high")) for name, r in lines.items()},
        backdrop=by_layer(table, "global_score") if "global_score" in table else None,
    )


def _alphas(table: pd.DataFrame) -> list[float]:
    return sorted(float(alpha) for alpha in table["alpha"].dropna().unique())
