"""Attention stages: how much of an object's attention stays in it, goes to the other one, or leaves both.

Lepori et al. (2024), section 4 and Fig. 2. With the shares r(X -> Y) of `attention_shares`, for the objects O
of an image and every head:

* ``WO`` within an object: the largest r(O -> O) over the objects;
* ``WP`` within a pair: the largest r(O -> the other objects);
* ``BG`` background: the largest r(O -> patches of no object);
* ``CLS``: the largest r(O -> CLS); other tokens outside the grid have columns of their own;
* ``heat`` the global score: WP + BG of the image, 0 for a local head and 1 for a global one;

each a mean over images. The published code does not measure WO but takes the complement, 1 - WP - BG. That
contains attention to CLS, and as WP and BG are each a largest value, it can fall below the true share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.attention_example import ExampleAttention, attend_in_example
from vit_mechinterp.circuits.attention_shares import measure_shares, part_tokens
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.token_sets import object_tokens
from vit_mechinterp.engine.checks import refuse_dropout
from vit_mechinterp.engine.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec.digest import digest
from vit_mechinterp.spec.tokens import parse_tokens

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["attention_stages", "peak_heads"]

WithinObject = Literal["direct", "complement"]

_NAMES = {"WO": "within object", "WP": "within pair", "BG": "background", "CLS": "CLS"}


def attention_stages(
    vit: HookedViT,
    data: Any,
    objects: Sequence[Any] | None = None,
    *,
    base: str = "base",
    wo_mode: WithinObject = "direct",
    first_peak_layer: int = 0,
    example: int | None = 0,
    progress: bool = True,
) -> CircuitResult:
    """Measure where the attention of object tokens goes, for every layer and head; nothing is changed.

    Args:
        vit: the model, in eval mode (or without dropout).
        data: images with the places of their objects.
        objects: token selectors of the objects that are compared (the pair); by default the columns ``box_1``
            and ``box_2``, or else ``object_1_tokens`` and ``object_2_tokens``.
        base: the image column.
        wo_mode: which within-object share the figures show: ``"direct"`` as measured, or ``"complement"``,
            1 - WP - BG, as published. The table has both.
        first_peak_layer: peaks are looked for from this layer on (the paper leaves out layer 0 of DINOv2).
        example: the example that a figure shows with the attention of the peak heads; None draws none.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table: ``layer, head, WO_direct, WO_complement, WP, BG``, a column per kind of token outside the grid
        (``CLS``, ``registers``, ...), ``heat`` and ``images``. Figures: ``stages`` (heat map over line
        chart), ``within_object`` (both definitions) and ``example`` (what the peak heads attend to in one
        image).

    Raises:
        SpecError: the model has no attention patterns, or ``wo_mode`` is neither.
        DataError: a column is missing, or objects share tokens.
    """
    if wo_mode not in ("direct", "complement"):
        raise SpecError(f"wo_mode={wo_mode!r} is not known. Choose 'direct' or 'complement'.")
    refuse_dropout(vit)
    columns = Data(data, vit)
    if objects is None:
        pairs = [(f"box_{k}", f"object_{k}_tokens") for k in (1, 2)]
        objects = [object_tokens(columns, box, tokens, "attention_stages") for box, tokens in pairs]
    tokens = part_tokens(vit, columns, objects, base)
    shares = measure_shares(vit, columns, base, tokens, progress=progress)
    table = _table(_kinds(shares, len(objects), tokens.names), columns.n)
    summary, found = _findings(table, wo_mode, first_peak_layer)
    shown = None
    if example is not None:
        peaks = peak_heads(table, wo_mode=wo_mode, first_layer=first_peak_layer)
        heads = _queried(shares[:, example], len(objects), peaks)
        shown = attend_in_example(vit, columns, base, tokens, heads, example)
    return CircuitResult(
        name="attention_stages",
        table=table,
        provenance=_origin(vit, columns, objects, base, wo_mode),
        summary=summary,
        description=_DESCRIPTION + "\n\n" + found,
        captions=_captions(wo_mode, columns.n, shown is not None),
        draw=_drawing(wo_mode, first_peak_layer, shown),
    )


def peak_heads(
    table: pd.DataFrame, *, wo_mode: WithinObject = "direct", first_layer: int = 0
) -> dict[str, tuple[int, int, float]]:
    """Return for WO, WP and BG the layer, head and value of the largest share in the table of a result."""
    seen = table[table["layer"] >= first_layer]
    peaks = {}
    for kind, column in {"WO": f"WO_{wo_mode}", "WP": "WP", "BG": "BG"}.items():
        top = seen.iloc[int(seen[column].argmax())]
        peaks[kind] = int(top["layer"]), int(top["head"]), float(top[column])
    return peaks


def _kinds(
    shares: Float[Tensor, "layer example head object set"], n_objects: int, names: Sequence[str]
) -> dict[str, Float[np.ndarray, "layer head"]]:
    """Reduce shares to the largest over objects per image, and these to means over images."""
    kinds = {f"{k}_direct" if k == "WO" else k: v for k, v in _by_kind(shares, n_objects).items()}
    kinds |= {_column(name): shares[..., n_objects + 1 + index] for index, name in enumerate(names)}
    means = {name: kind.amax(dim=-1).double().mean(dim=1).numpy() for name, kind in kinds.items()}
    means["heat"] = means["WP"] + means["BG"]
    means["WO_complement"] = 1 - means["heat"]
    return means


def _by_kind(
    shares: Float[Tensor, "*batch object set"], n_objects: int
) -> dict[str, Float[Tensor, "*batch object"]]:
    """Return the share of every object by kind of attention."""
    among = shares[..., :n_objects]
    own = among.diagonal(dim1=-2, dim2=-1)
    return {"WO": own, "WP": among.sum(dim=-1) - own, "BG": shares[..., n_objects]}


def _queried(
    shares: Float[Tensor, "layer head object set"],
    n_objects: int,
    peaks: Mapping[str, tuple[int, int, float]],
) -> dict[str, tuple[int, int, int]]:
    """Name the peak heads, each with the object of one image that has the larger share."""
    of_objects = _by_kind(shares, n_objects)
    heads = {}
    for kind, (layer, head, _) in peaks.items():
        number = int(of_objects[kind][layer, head].argmax())
        heads[f"{_NAMES[kind]}\nlayer {layer}, head {head}, object {number + 1}"] = layer, head, number
    return heads


def _column(token_name: str) -> str:
    return "CLS" if token_name == "cls" else token_name  # noqa: S105 - no password


def _table(values: Mapping[str, Float[np.ndarray, "layer head"]], n_images: int) -> pd.DataFrame:
    import pandas as pd

    layer, head = np.indices(values["WP"].shape)
    first = ["WO_direct", "WO_complement", "WP", "BG"]
    order = [*first, *(name for name in values if name not in (*first, "heat")), "heat"]
    columns = {"layer": layer.ravel(), "head": head.ravel()} | {name: values[name].ravel() for name in order}
    return pd.DataFrame(columns | {"images": n_images})


def _origin(
    vit: HookedViT, data: Data, objects: Sequence[Any], base: str, wo_mode: WithinObject
) -> dict[str, Any]:
    selectors = [parse_tokens(tokens) for tokens in objects]
    document = [s if isinstance(s, (str, tuple)) else s.model_dump() for s in selectors]
    used = sorted({base} | {v for s in document if isinstance(s, dict) for v in s.values()})
    return provenance(
        spec=digest({"circuit": "attention_stages", "objects": document, "base": base}),
        model=vit.fingerprint(),
        model_source=vit.source or type(vit.module).__name__,
        data=data.fingerprint(used),
        columns=used,
        examples=data.n,
        objects=document,
        wo_mode=wo_mode,
        device=str(vit.device),
        dtype=str(vit.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _lines(table: pd.DataFrame, wo_mode: WithinObject) -> dict[str, list[float]]:
    """Return the largest value over heads per layer, by the name a reader sees."""
    columns = {"WO": f"WO_{wo_mode}", "WP": "WP", "BG": "BG", "CLS": "CLS"}
    best = table.groupby("layer").max()
    return {_NAMES[kind]: best[column].tolist() for kind, column in columns.items() if column in best}


def _findings(table: pd.DataFrame, wo_mode: WithinObject, first: int) -> tuple[dict[str, float | str], str]:
    peaks = peak_heads(table, wo_mode=wo_mode, first_layer=first)
    by_layer: dict[int, list[str]] = {}
    for kind, (layer, _, _) in peaks.items():
        by_layer.setdefault(layer, []).append(kind)
    order = " → ".join(" = ".join(by_layer[layer]) for layer in sorted(by_layer))
    said = [f"{_NAMES[k]} {value:.2f} (layer {at}, head {head})" for k, (at, head, value) in peaks.items()]
    heat = table.groupby("layer")["heat"].mean()
    gap = float((table["WO_direct"] - table["WO_complement"]).mean())
    found = (
        f"Largest shares over all heads: {'; '.join(said)}. In order of depth the peaks are {order}. "
        f"Averaged over heads, attention is most local in layer {int(heat.argmin())} (global score "
        f"{heat.min():.2f}) and most global in layer {int(heat.argmax())} ({heat.max():.2f}). On average, "
        f"WO as measured lies {abs(gap):.2f} {'above' if gap >= 0 else 'below'} the complement 1 − WP − BG."
    )
    summary: dict[str, float | str] = {
        f"{_NAMES[kind]} ({kind}), largest": value for kind, (_, _, value) in peaks.items()
    }
    return summary | {"order of the peaks": order}, found


_DESCRIPTION = (
    "For every head, the share of the attention of an object's tokens that stays within the object (WO), "
    "goes to the other object (WP), to background patches (BG), or to CLS; the larger value of the two "
    "objects, averaged over images. A head is local (blue) if its objects attend to themselves, global "
    "(red) if they attend beyond. This only looks; nothing is changed."
)


def _captions(wo_mode: WithinObject, n_images: int, with_example: bool) -> dict[str, str]:
    meaning = "measured directly" if wo_mode == "direct" else "the complement 1 − WP − BG"
    captions = {
        "stages": (
            "Above: every head's global score, WP + BG (as each is the larger value of the two objects, it "
            "can exceed 1). Below: per layer, the largest share over its heads, with a star at each peak; "
            f"WO is {meaning}. Means over {n_images} images."
        ),
        "within_object": (
            "Attention within an object by both definitions: as measured, and as the complement "
            "1 − WP − BG. The complement also counts attention to CLS, and loses where the two objects "
            "differ, because WP and BG are each the larger value of the two."
        ),
    }
    if with_example:
        captions["example"] = (
            "One image: the patches that the three peak heads attend to, each from the object that has "
            "the larger share there. Bright patches receive most; each panel is scaled to its own largest "
            "value."
        )
    return captions


def _drawing(
    wo_mode: WithinObject, first_peak_layer: int, shown: ExampleAttention | None
) -> Callable[[CircuitResult], dict[str, Figure]]:
    def draw(result: CircuitResult) -> dict[str, Figure]:
        from vit_mechinterp.figures import lines_by_layer, stages_over_layers

        heat = result.table.pivot_table(index="layer", columns="head", values="heat").to_numpy()
        lines = _lines(result.table, wo_mode)
        best = result.table.groupby("layer").max()
        both = {"as measured": best["WO_direct"].tolist(), "1 − WP − BG": best["WO_complement"].tolist()}
        lowest = min(0.0, float(best["WO_complement"].min()))
        figures = {
            "stages": stages_over_layers(heat, lines, first_peak_layer=first_peak_layer),
            "within_object": lines_by_layer(
                both,
                label="max. WO over heads",
                limits=(lowest, 1.0),
                first_peak_layer=first_peak_layer,
            ),
        }
        return figures if shown is None else {**figures, "example": shown.figure()}

    return draw
