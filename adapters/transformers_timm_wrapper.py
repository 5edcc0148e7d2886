"""transformers' wrapper around a timm model: the timm row of the module inside, read through the wrapper."""

from __future__ import annotations

from typing import Any

from vit_mechinterp.adapters.timm_inside import inside
from vit_mechinterp.model.layout import Family, Port, Readout


def readout(model: Any, native: Readout) -> Readout:
    """The wrapper's own logits, or what it pools."""
    if hasattr(model, "num_labels") and type(model).__name__.endswith("ForImageClassification"):
        return Readout("logits", native.ports)
    # The wrapper calls forward_features and forward_head, so the timm module itself is never called.
    pooled = Port("", field="pooler_output")
    return Readout("pooler_output", {**native.ports, "pooled": pooled, "logits": "the model has no head"})


def around(family: Family) -> Family:
    """The row of a timm family for a model that holds one of its modules as ``timm_model``."""
    return inside(family, "timm_model", "transformers", "transformers.timm_wrapper", readout)
