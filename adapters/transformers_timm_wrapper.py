"""transformers' wrapper around a timm model: the timm row of the module inside, read through the wrapper."""

from __future__ import annotations

import dataclasses
from typing import Any

from vit_mechinterp.model.layout import Family, Port, Readout

INSIDE = "timm_model"


def around(family: Family) -> Family:
    """The row of a timm family for a model that holds one of its modules as ``timm_model``."""

    def readout(model: Any) -> Readout:
        native = family.readout(model.timm_model)
        ports = {
            site: dataclasses.replace(port, path=f"{INSIDE}.{port.path}" if port.path else INSIDE)
            if isinstance(port, Port)
            else port
            for site, port in native.ports.items()
        }
        if hasattr(model, "num_labels") and type(model).__name__.endswith("ForImageClassification"):
            return Readout("logits", ports)
        # The wrapper calls forward_features and forward_head, so the timm module itself is never called.
        pooled = Port("", field="pooler_output")
        return Readout("pooler_output", {**ports, "pooled": pooled, "logits": "the model has no head"})

    return dataclasses.replace(
        family,
        name=f"transformers.timm_wrapper({family.name})",
        library="transformers",
        blocks=tuple(f"{INSIDE}.{path}" for path in family.blocks),
        tokens=lambda model: family.tokens(model.timm_model),
        d_model=lambda model: family.d_model(model.timm_model),
        readout=readout,
        inputs=lambda model, x: family.inputs(model.timm_model, x),
        strangers=lambda model: family.strangers(model.timm_model),
        refuses=lambda model: family.refuses(model.timm_model),
        any_size=lambda model: family.any_size(model.timm_model),
    )
