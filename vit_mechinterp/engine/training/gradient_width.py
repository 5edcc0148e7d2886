"""How many rows a forward should hold whose gradients are wanted: its activations stay alive behind it."""

from __future__ import annotations

from collections.abc import Sequence

from vit_mechinterp.engine.scheduling.budget import budget_of
from vit_mechinterp.engine.scheduling.footprint import footprint
from vit_mechinterp.engine.scheduling.throughput import likely_width
from vit_mechinterp.engine.training.prepared import Prepared

__all__ = ["gradient_width"]


def gradient_width(preparations: Sequence[Prepared]) -> int:
    """Rows per forward for batches of some preparations of one model.

    On a CPU what keeps one activation within its cache, on a GPU what fits; in either case every block's
    activations of a row are counted as if all were kept.
    """
    vit = preparations[0].vit
    row = max(1, max(footprint(vit, own.schedule).row for own in preparations) * vit.layout.n_layers)
    most = max(1, budget_of(vit) // row)
    return most if vit.device.type == "cuda" else min(likely_width(vit), most)
