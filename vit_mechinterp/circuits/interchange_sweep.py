"""Interchange sweep: where, layer by layer, the residual stream carries what decides the answer.

For every layer and every token set, the activations of the source image are put in place of the base image's
(interchange intervention), and the rest of the network runs on. The whole sweep is one plan: clean forwards
are shared, and every run computes only the blocks above its own intervention.

Token sets, paired by position in the selection: the edited object's tokens take the values of the source
object's; the other object's tokens those of the other object of the source image; CLS, background and "all"
take the values at the same positions of the source image. The background of an example is every patch that no
object covers in either of its two images, so that base and source positions pair up. Exchanging all tokens of
a block's output makes the network answer for the source image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import bootstrap_interval, check_resampling
from vit_mechinterp.circuits.token_sets import BACKGROUND, TokenPair, object_tokens, with_background
from vit_mechinterp.engine import execute
from vit_mechinterp.engine import plan as make_plan
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Experiment, Interchange, Run, Site, Sweep
from vit_mechinterp.spec.tokens import parse_tokens

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from matplotlib.figure import Figure

    from vit_mechinterp.engine import Results

__all__ = ["interchange_sweep", "sweep_runs"]

CLEAN = "clean"


def interchange_sweep(
    vit: HookedViT,
    data: Any,
    *,
    site: str = "resid_post",
    layers: Sequence[int] | Literal["all"] = "all",
    token_sets: Mapping[str, TokenPair] | None = None,
    base: str = "base",
    source: str = "source",
    resamples: int = 2000,
    seed: int = 0,
    batch_size: int | Literal["auto"] = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Interchange every layer's activation at every token set, as one plan, and measure the decision.

    Args:
        vit: the model; its output has one logit per class.
        data: pairs of images with ``label`` and ``counterfactual_label``, and the places of the objects.
        site: a site inside a block with a token axis, such as ``"resid_post"`` or ``"mlp_out"``.
        layers: the layers to intervene in.
        token_sets: name to (base selector, source selector); by default the edited object, the other object,
            CLS where the model has it, background, and all, from the columns ``edited_box``, ``source_box``,
            ``other_box``, ``source_other_box`` (or the same as ``*_tokens``).
        base, source: the image columns.
        resamples: resamples of the bootstrap over examples; the intervals hold 95 %.
        seed: seeds the bootstrap.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per token set and layer and one for the clean run (``layer`` missing): ``decision``,
        the share of examples whose prediction is the counterfactual label; ``logit_difference``, the mean
        change of (counterfactual label's logit minus label's logit) against the clean run, in logits;
        ``*_low`` and ``*_high``, their intervals; ``n``. Figures: ``decision`` and ``logit_difference``,
        layer by token set, and ``decision_lines`` with the line of no effect.

    Raises:
        SpecError: the site or a selector does not fit the model.
        DataError: a column is missing, or the labels are no classes of the model.
    """
    check_resampling(resamples, seed)
    if token_sets is None:
        data, token_sets = _default_sets(vit, data, base, source)
    label, counterfactual = _labels(vit, Data(data, vit))
    runs = sweep_runs(token_sets, site=site, layers=layers, base=base, source=source)
    plan = make_plan(vit, runs, data, batch_size=batch_size)
    results = execute(vit, runs, data, batch_size=batch_size, progress=progress)
    order = list(range(vit.layout.n_layers)) if layers == "all" else list(layers)
    table = _table(results, list(token_sets), order, label, counterfactual, resamples, seed)
    document = Experiment(runs=runs).to_yaml()
    summary, found = _findings(table, list(token_sets))
    return CircuitResult(
        name="interchange_sweep",
        table=table,
        provenance=provenance(
            results.provenance, seed=seed, resamples=resamples, site=site, document=document, plan=str(plan)
        ),
        summary=summary
        | {"forwards' worth of blocks": plan.forwards, "one run at a time": plan.naive_forwards},
        description=_DESCRIPTION.format(site=site) + "\n\n" + found,
        captions=_CAPTIONS,
        draw=_draw,
    )


def sweep_runs(
    token_sets: Mapping[str, TokenPair],
    *,
    site: str = "resid_post",
    layers: Sequence[int] | Literal["all"] = "all",
    base: str = "base",
    source: str = "source",
) -> list[Run | Sweep]:
    """Return the document of the sweep: the clean run, and a Sweep over token sets and layers.

    Raises:
        SpecError: ``site`` is none, or stands in no block.
    """
    swap = Interchange(site=str(Site.parse(f"blocks.0.{site}")), source=source)
    over = {name: {"tokens": tokens, "source_tokens": there} for name, (tokens, there) in token_sets.items()}
    axes: dict[str, Any] = {"token_set": over, "layer": layers if layers == "all" else list(layers)}
    sweep = Sweep(name="{token_set}, layer {layer}", interventions=(swap,), base=base, over=axes)
    return [Run(name=CLEAN, base=base), sweep]


def _default_sets(vit: HookedViT, data: Any, base: str, source: str) -> tuple[Any, dict[str, TokenPair]]:
    columns = Data(data, vit)

    def pair(here: str, there: str) -> TokenPair:
        names = ((f"{name}_box", f"{name}_tokens") for name in (here, there))
        first, second = (object_tokens(columns, box, tokens, "interchange_sweep") for box, tokens in names)
        return first, second

    sets = {"edited object": pair("edited", "source"), "other object": pair("other", "source_other")}
    data = with_background(data, vit, list(sets.values()), base=base, source=source)
    if vit.layout.tokens.positions("cls") is not None:
        sets["CLS"] = ("cls", "cls")
    background = parse_tokens({"column": BACKGROUND})
    return data, sets | {"background": (background, background), "all": ("all", "all")}


def _labels(vit: HookedViT, data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Return label and counterfactual label of every example."""
    with torch.no_grad():
        shape = tuple(vit(vit.blank(1)).shape[1:])
    if len(shape) != 1:
        raise SpecError(
            f"interchange_sweep measures decisions between classes, and {type(vit.module).__name__} gives "
            f"{vit.layout.output} of shape {shape} per example."
        )
    found = []
    for name in ("label", "counterfactual_label"):
        data.require(name, "interchange_sweep")
        values = torch.tensor([row[0] for row in data.integers(name)])
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= shape[0]:
            raise DataError(
                f"Column {name!r} holds labels from {low} to {high}; the model has classes 0 to "
                f"{shape[0] - 1}."
            )
        found.append(values)
    return found[0], found[1]


def _table(
    results: Results,
    names: Sequence[str],
    layers: Sequence[int],
    label: torch.Tensor,
    counterfactual: torch.Tensor,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    import pandas as pd

    logits = results.logits.double()
    examples = torch.arange(logits.shape[1])
    decision = (logits.argmax(dim=-1) == counterfactual).double().numpy()
    difference = logits[:, examples, counterfactual] - logits[:, examples, label]
    change = (difference - difference[results.run_names.index(CLEAN)]).numpy()
    places: dict[str, tuple[str, int | None]] = {CLEAN: ("none (clean)", None)}
    places |= {f"{name}, layer {layer}": (name, layer) for name in names for layer in layers}
    rows = [places[run] for run in results.run_names]
    columns: dict[str, Any] = {
        "token_set": [name for name, _ in rows],
        "layer": pd.array([layer for _, layer in rows], dtype="Int64"),
    }
    for quantity, values in (("decision", decision), ("logit_difference", change)):
        low, high = bootstrap_interval(values, resamples=resamples, seed=seed)
        columns |= {quantity: values.mean(axis=1), f"{quantity}_low": low, f"{quantity}_high": high}
    return pd.DataFrame(columns | {"n": logits.shape[1]})


def _findings(table: pd.DataFrame, names: Sequence[str]) -> tuple[dict[str, float | int | str], str]:
    clean = table[table["layer"].isna()].iloc[0]
    swept = table[table["layer"].notna()]
    summary: dict[str, float | int | str] = {"no effect": float(clean["decision"])}
    sentences = [
        f"Without an intervention the model gives the counterfactual answer to {clean['decision']:.0%} of "
        f"the {int(clean['n'])} examples."
    ]
    for name in names:
        rows = swept[swept["token_set"] == name]
        top, last = rows.iloc[int(rows["decision"].argmax())], rows.iloc[-1]
        summary[f"{name}, largest effect"] = float(top["decision"])
        clear = float(top["decision_low"]) > float(clean["decision_high"])
        sentences.append(
            f"{name[0].upper()}{name[1:]}: at most {top['decision']:.0%} (layer {int(top['layer'])}"
            f"{'' if clear else ', within the noise of no effect'}), {last['decision']:.0%} after the last "
            "layer."
        )
    if {"edited object", "CLS"} <= set(names):
        sentences.append(_handover(swept))
    return summary, " ".join(sentences)


def _handover(swept: pd.DataFrame) -> str:
    """Say from which layer on CLS carries more of the decision than the edited object's tokens."""
    wide = swept.pivot_table(index="layer", columns="token_set", values="decision")
    lead = np.sign((wide["edited object"] - wide["CLS"]).to_numpy())
    if not lead.any():
        return "In every layer CLS and the edited object's tokens carry equally much of the decision."
    if not (lead < 0).any() or not (lead > 0).any():
        ahead, behind = (
            ("the edited object's tokens carry", "CLS")
            if lead.max() > 0
            else ("CLS carries", "the edited object's tokens")
        )
        if lead.all():
            return f"In every layer {ahead} more of the decision than {behind}."
        return f"In every layer {ahead} at least as much of the decision as {behind}."
    last = int(np.flatnonzero(lead > 0)[-1])
    above, layer = lead[last + 1 :], int(wide.index[last])
    if len(above) == 0:
        return (
            f"In the last layer of the sweep ({layer}) the edited object's tokens carry more of the decision "
            "than CLS, though not in every layer."
        )
    if not above.any():
        return f"Above layer {layer}, CLS and the edited object's tokens carry equally much of the decision."
    amount = "more of the decision than" if above.all() else "at least as much of the decision as"
    return f"Above layer {layer}, CLS carries {amount} the edited object's tokens."


_DESCRIPTION = (
    "At each layer's {site}, the activations of the source image take the place of the base image's, at "
    "one set of tokens at a time. The edited object takes the source object's activations, the other "
    "object those of its counterpart; CLS, background and all take those of the same positions. Where the "
    "counterfactual answer appears, those tokens at that layer carry what decides."
)
_CAPTIONS = {
    "decision": (
        "Share of examples whose prediction becomes the counterfactual label. The lowest row is the clean "
        "run."
    ),
    "logit_difference": (
        "Mean change of the logit difference (counterfactual label minus label) against the clean run, in "
        "logits."
    ),
    "decision_lines": (
        "The same shares by layer, with 95 % bootstrap intervals and a star at each peak; the dotted line "
        "is the clean run: no effect."
    ),
}


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures import condition_map, lines_by_layer

    swept = result.table[result.table["layer"].notna()]
    clean = result.table[result.table["layer"].isna()].iloc[0]
    names = list(dict.fromkeys(swept["token_set"]))
    maps = {q: _matrix(swept, names, q) for q in ("decision", "logit_difference")}
    ends = [_matrix(swept, names, f"decision_{end}") for end in ("low", "high")]
    rows = [*names, str(clean["token_set"])]
    with_clean = np.column_stack([maps["decision"], np.full(len(maps["decision"]), clean["decision"])])
    bound = _round_up(float(np.abs(maps["logit_difference"]).max()))
    return {
        "decision": condition_map(with_clean, rows, label="counterfactual answers"),
        "logit_difference": condition_map(
            maps["logit_difference"], names, label="change in logits", limits=(-bound, bound)
        ),
        "decision_lines": lines_by_layer(
            {name: maps["decision"][:, index].tolist() for index, name in enumerate(names)},
            label="counterfactual answers",
            references={"no effect": float(clean["decision"])},
            bands={
                name: (ends[0][:, index].tolist(), ends[1][:, index].tolist())
                for index, name in enumerate(names)
            },
        ),
    }


def _matrix(swept: pd.DataFrame, names: Sequence[str], quantity: str) -> Float[np.ndarray, "layer token_set"]:
    wide = swept.pivot_table(index="layer", columns="token_set", values=quantity)
    return wide[list(names)].to_numpy(dtype=float)


def _round_up(value: float) -> float:
    """Return the next of 1, 1.5, 2, 3, 5, 7.5, 10, ... : a round number for a colour bar to end at."""
    power = 10.0 ** np.floor(np.log10(max(value, 1e-6)))
    return float(
        next(step * power for step in (1, 1.5, 2, 3, 5, 7.5, 10) if step * power >= value * (1 - 1e-9))
    )
