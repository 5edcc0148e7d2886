"""Kinds of attention: where the attention of an object's tokens goes, head by head.

With the shares r(X -> Y) of `attention_shares`, for the compared objects O of an image (Lepori et al. 2024,
section 4 and Fig. 2), and for relational match to sample the display pair D:

* ``WO`` within an object: the largest r(O -> O) over the objects;
* ``WP`` within a pair: the largest r(O -> the other objects of its pair);
* ``BP`` between pairs: the larger of r(both objects -> D) and r(D -> both objects);
* ``within_pair``: the largest r(O -> the other object of its pair) over the objects of both pairs;
* ``BG`` background: the largest r(O -> patches of no object);
* ``CLS``: the largest r(O -> CLS); other tokens outside the grid, and the overlap of objects, likewise;
* ``heat`` the global score: WP + BG of the image, 0 for a local head and 1 for a global one.

The published code does not measure WO but takes the complement, 1 - WP - BG. That contains attention to CLS
and to the display pair, and as WP and BG are each a largest value, it can fall below the true share.

Two scores are this project's own, not the paper's:

* ``perceptual``: WO - WP - BG, with WO as measured, from -1 to 1;
* ``relational``: WP, or BP where there is a display pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.attention_parts import TokenSets
from vit_mechinterp.circuits.reading import interval_columns
from vit_mechinterp.errors import SpecError

if TYPE_CHECKING:
    import pandas as pd

    from vit_mechinterp.circuits.result import CircuitResult

__all__ = ["KIND_NAMES", "WithinObject", "column_of", "kinds_of", "kinds_table", "layer_heat", "peak_heads"]

WithinObject = Literal["direct", "complement"]

KIND_NAMES = {
    "WO": "within object",
    "WP": "within pair",
    "BG": "background",
    "CLS": "CLS",
    "BP": "between pairs",
}
"""What a reader calls a kind, in the order of the figures: with or without BP, a kind has one colour."""


def kinds_of(
    shares: Float[Tensor, "*batch query set"], tokens: TokenSets
) -> dict[str, Float[Tensor, "*batch candidate"]]:
    """Return the shares by kind of attention, each with the query sets over which its largest is taken.

    The candidates are the compared objects; for ``BP`` the sample pair and the display pair, for
    ``within_pair`` the objects of both.
    """
    n, m = tokens.n_compared, tokens.n_objects
    own = shares[..., :n, :n].diagonal(dim1=-2, dim2=-1)
    kinds = {"WO": own, "WP": shares[..., :n, :n].sum(dim=-1) - own}
    if tokens.has_display:
        among = shares[..., n:m, n:m]
        across = [shares[..., m, n:m].sum(dim=-1), shares[..., m + 1, :n].sum(dim=-1)]
        kinds["BP"] = torch.stack(across, dim=-1)
        display = among.sum(dim=-1) - among.diagonal(dim1=-2, dim2=-1)
        kinds["within_pair"] = torch.cat([kinds["WP"], display], dim=-1)
    kinds["BG"] = shares[..., :n, m]
    for index, name in enumerate(tokens.names):
        kinds["CLS" if name == "cls" else name] = shares[..., :n, m + 1 + index]
    return kinds


def kinds_table(
    shares: Float[Tensor, "layer example head query set"],
    tokens: TokenSets,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Reduce shares to the largest over candidates per image, and these to means over images with intervals.

    Returns:
        One row per layer and head: every kind and score as ``NAME``, ``NAME_low``, ``NAME_high``; and
        ``images``.
    """
    import pandas as pd

    counted = shares[:, tokens.counted.to(shares.device)]
    kinds = {name: kind.amax(dim=-1).double() for name, kind in kinds_of(counted, tokens).items()}
    within = kinds.pop("WO")
    heat = kinds["WP"] + kinds["BG"]
    measures = {
        "WO_direct": within,
        "WO_complement": 1 - heat,
        **kinds,
        "heat": heat,
        "perceptual": within - heat,
        "relational": kinds["BP" if tokens.has_display else "WP"],
    }
    layer, head = np.indices((shares.shape[0], shares.shape[2]))
    columns: dict[str, object] = {"layer": layer.ravel(), "head": head.ravel()}
    stacked = np.concatenate([m.permute(0, 2, 1).flatten(0, 1).numpy() for m in measures.values()])
    found = interval_columns(stacked, resamples=resamples, seed=seed)
    for name, *ends in zip(measures, *(np.split(v, len(measures)) for v in found.values()), strict=True):
        columns |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    return pd.DataFrame(columns | {"images": counted.shape[1]})


def peak_heads(
    table: pd.DataFrame, *, wo_mode: WithinObject = "direct", first_layer: int = 0
) -> dict[str, tuple[int, int, float]]:
    """Return the layer, head and value of the largest share in the table of a result, from ``first_layer``
    on: for WO, WP, BP (if there is a display pair) and BG.

    Raises:
        SpecError: there is no such layer.
    """
    seen = table[table["layer"] >= first_layer]
    if first_layer < 0 or len(seen) == 0:
        raise SpecError(f"Peaks cannot start at layer {first_layer}; layers are 0 to {table['layer'].max()}.")
    peaks = {}
    for kind in ("WO", "WP", "BP", "BG"):
        if (column := column_of(kind, wo_mode)) in table:
            top = seen.iloc[int(seen[column].argmax())]
            peaks[kind] = int(top["layer"]), int(top["head"]), float(top[column])
    return peaks


def column_of(kind: str, wo_mode: WithinObject) -> str:
    """Return the table's column for a kind of attention."""
    return f"WO_{wo_mode}" if kind == "WO" else kind


def layer_heat(stages: CircuitResult) -> list[float]:
    """Return the global score of every layer, the mean of ``heat`` over its heads, cut to 0..1.

    It colours the background of charts over layers (``backdrop`` of `lines_by_layer` and `das_by_layer`), as
    the paper's Figs. 3 to 5 do with its Fig. 2.

    Raises:
        SpecError: the result is not one of `attention_stages`.
    """
    if stages.name != "attention_stages" or "heat" not in stages.table:
        raise SpecError(
            f"The global score of layers comes from a result of attention_stages, not of {stages.name!r}."
        )
    means = stages.table.groupby("layer")["heat"].mean()
    return [float(value) for value in means.clip(0.0, 1.0)]
