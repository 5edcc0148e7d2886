"""The table of a patching: where every cell lies, and what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.bound_metric import BoundMetric
from vit_mechinterp.circuits.effects import effect_columns, gap_problem
from vit_mechinterp.circuits.patching_cells import Cell

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["patching_table"]


def patching_table(
    cells: Sequence[Cell],
    directions: Sequence[str],
    values: Float[Tensor, "run example"],
    metric: BoundMetric,
    example: int,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    """Return one row per direction and cell.

    Args:
        cells: what was patched.
        directions: ``"denoising"``, ``"noising"``, or both.
        values: the metric of every cell, its directions side by side, cell by cell.
        metric: gives the ends of the gap.
        example: the pair that ``pair_change`` and ``pair_normalised`` are of.
        resamples, seed: of the bootstrap and the permutation test.
    """
    import pandas as pd

    assert metric.other is not None
    parts = []
    for index, way in enumerate(directions):
        ends = (metric.clean, metric.other) if way == "noising" else (metric.other, metric.clean)
        own = values[index :: len(directions)]
        places = {
            "direction": way,
            "kind": [cell.kind for cell in cells],
            "site": [cell.site.split(".", 2)[2] for cell in cells],
            "layer": [cell.layer for cell in cells],
            "head": pd.array([cell.head for cell in cells], dtype="Int64"),
            "tokens": ["all" if cell.head is not None else cell.label for cell in cells],
        }
        for name in ("frame", "row", "column"):
            numbers = [None if cell.window is None else getattr(cell.window, name) for cell in cells]
            places[name] = pd.array(numbers, dtype="Int64")
        effects = effect_columns(own, *ends, resamples=resamples, seed=seed)
        change = (own[:, example] - ends[0][example]).numpy()
        gap = float(ends[1][example] - ends[0][example])
        small = gap_problem(ends[0][example : example + 1], ends[1][example : example + 1])
        effects |= {"pair_change": change, "pair_normalised": np.nan if small else change / gap}
        parts.append(pd.DataFrame(places | effects))
    return pd.concat(parts, ignore_index=True)
