"""The words and the figures of attention stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vit_mechinterp.circuits.attention_example import ExampleAttention
from vit_mechinterp.circuits.attention_kinds import KIND_NAMES, WithinObject, column_of
from vit_mechinterp.circuits.attention_parts import OVERLAP
from vit_mechinterp.circuits.result import CircuitResult

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from jaxtyping import Float
    from matplotlib.figure import Figure

__all__ = ["captions", "description", "drawing", "findings"]

_DESCRIPTION = (
    "For every head, the share of the attention of an object's tokens that stays within the object (WO), "
    "goes to the other object of its pair (WP), {across}to background patches (BG), or to CLS; the larger "
    "value of the two objects, averaged over images. A head is local (blue) if its objects attend to "
    "themselves, global (red) if they attend beyond. This only looks; nothing is changed.\n\n"
    "The perceptual score (WO − WP − BG) and the relational score ({relational}) of a head are this "
    "project's own; the paper defines neither.{left_out}"
)


def description(has_display: bool, left_out: int) -> str:
    """Say what is measured."""
    return _DESCRIPTION.format(
        across="from a whole pair to the other pair (BP), " if has_display else "",
        relational="BP" if has_display else "WP",
        left_out=f" Images left out, because an object in them has no patch of its own: {left_out}."
        if left_out
        else "",
    )


def findings(
    table: pd.DataFrame, peaks: Mapping[str, tuple[int, int, float]]
) -> tuple[dict[str, float | int | str], str]:
    """Return the few numbers of a summary, and what was found in words."""
    by_layer: dict[int, list[str]] = {}
    for kind, (layer, _, _) in peaks.items():
        by_layer.setdefault(layer, []).append(kind)
    order = " → ".join(" = ".join(by_layer[layer]) for layer in sorted(by_layer))
    said = [
        f"{KIND_NAMES[k]} {value:.2f} (layer {at}, head {head})" for k, (at, head, value) in peaks.items()
    ]
    heat = table.groupby("layer")["heat"].mean()
    gap = float((table["WO_direct"] - table["WO_complement"]).mean())
    local = int((table["heat"] < 0.5).sum())
    tops = {score: table.iloc[int(table[score].argmax())] for score in ("perceptual", "relational")}
    scored = [
        f"{name} score {top[name]:.2f} (layer {int(top['layer'])}, head {int(top['head'])})"
        for name, top in tops.items()
    ]
    found = (
        f"Largest shares over all heads: {'; '.join(said)}. In order of depth the peaks are {order}. "
        f"Averaged over heads, attention is most local in layer {int(heat.argmin())} (global score "
        f"{heat.min():.2f}) and most global in layer {int(heat.argmax())} ({heat.max():.2f}); {local} of "
        f"{len(table)} heads are local, with a global score below 0.5. Largest by our own scores: "
        f"{'; '.join(scored)}. On average, WO as measured lies {abs(gap):.2f} "
        f"{'above' if gap >= 0 else 'below'} the complement 1 − WP − BG."
    )
    summary: dict[str, float | int | str] = {
        f"{KIND_NAMES[kind]} ({kind}), largest": value for kind, (_, _, value) in peaks.items()
    }
    return summary | {"order of the peaks": order, "local heads": f"{local} of {len(table)}"}, found


def captions(table: pd.DataFrame, wo_mode: WithinObject, shown: int | None) -> dict[str, str]:
    """Say what each figure shows; ``shown`` is the example drawn, None if none is."""
    has_display = "BP" in table
    others = {"CLS": True, "the display pair": has_display, "shared patches": OVERLAP in table}
    beyond = "attention to " + " and to ".join(name for name, there in others.items() if there)
    meaning = "measured directly" if wo_mode == "direct" else "the complement 1 − WP − BG"
    alone = (
        "; as published it leaves out attention to the display pair, so a head with little else seems local"
        if has_display
        else ""
    )
    own = "This score is this project's own; the paper names a perceptual score without a formula."
    made = {
        "stages": (
            "Above: every head's global score, WP + BG (as each is the larger value of the two objects, it "
            f"can exceed 1{alone}). Below: per layer, the largest share over its heads, with a star at each "
            "peak and the 95 % bootstrap interval over images of that head as a tint; WO is "
            f"{meaning}. Means over {int(table['images'].iloc[0])} images."
        ),
        "within_object": (
            "Attention within an object by both definitions: as measured, and as the complement "
            f"1 − WP − BG. The complement also counts {beyond}, and loses where the two objects "
            "differ, because WP and BG are each the larger value of the two."
        ),
        "perceptual_score": (
            "Perceptual score of every head, WO − WP − BG with WO as measured: 1 if its objects attend to "
            f"themselves alone, −1 if beyond alone. {own}"
        ),
        "relational_score": (
            "Relational score of every head, "
            + ("BP: the share of attention from one pair to the other. " if has_display else "")
            + ("" if has_display else "WP: the share of attention from one object to the other. ")
            + "This score is this project's own."
        ),
    }
    if shown is not None:
        made["example"] = (
            f"Image {shown}: the patches that the peak heads attend to, each from the object (for attention "
            "between pairs, the pair) that has the larger share there. Bright patches receive most; each "
            "panel is scaled to its own largest value."
        )
    return made


def drawing(
    wo_mode: WithinObject, first_peak_layer: int, shown: ExampleAttention | None
) -> Callable[[CircuitResult], dict[str, Figure]]:
    """Return the function that draws a result's figures."""

    def draw(result: CircuitResult) -> dict[str, Figure]:
        from vit_mechinterp.figures import head_layer_map, lines_by_layer, stages_over_layers

        table = result.table
        lines, bands = _lines(table, {KIND_NAMES[k]: column_of(k, wo_mode) for k in KIND_NAMES})
        both, both_bands = _lines(table, {"as measured": "WO_direct", "1 − WP − BG": "WO_complement"})
        lowest = min(0.0, min(both["1 − WP − BG"]))
        figures = {
            "stages": stages_over_layers(
                _heads(table, "heat"), lines, bands=bands, first_peak_layer=first_peak_layer
            ),
            "within_object": lines_by_layer(
                both,
                label="max. WO over heads",
                limits=(lowest, 1.0),
                bands=both_bands,
                first_peak_layer=first_peak_layer,
            ),
            "perceptual_score": head_layer_map(
                _heads(table, "perceptual"),
                label="perceptual score (our own)",
                ends=("beyond", "within"),
                limits=(-1.0, 1.0),
            ),
            "relational_score": head_layer_map(
                _heads(table, "relational"),
                label="relational score (our own)",
                ends=("", "between pairs" if "BP" in table else "between objects"),
            ),
        }
        return figures if shown is None else {**figures, "example": shown.figure()}

    return draw


def _heads(table: pd.DataFrame, column: str) -> Float[np.ndarray, "layer head"]:
    return table.pivot_table(index="layer", columns="head", values=column).to_numpy()


def _lines(
    table: pd.DataFrame, columns: Mapping[str, str]
) -> tuple[dict[str, list[float]], dict[str, tuple[list[float], list[float]]]]:
    """Return per layer the largest value over heads, and the interval of the head that has it."""
    lines, bands = {}, {}
    for name, column in columns.items():
        if column in table:
            best = table.loc[table.groupby("layer")[column].idxmax()]
            lines[name] = best[column].tolist()
            if not best[f"{column}_low"].isna().any():
                bands[name] = best[f"{column}_low"].tolist(), best[f"{column}_high"].tolist()
    return lines, bands
