"""transformers' wrapper around a timm model: the timm row of the module inside, read through the wrapper."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from vit_mechinterp.model.layout import Family, Port, Readout

INSIDE = "timm_model"


def _inside(model: Any) -> nn.Module:
    module: nn.Module = model.timm_model
    return module


def around(family: Family) -> Family:
    """The row of a timm family for a model that holds one of its modules as ``timm_model``."""

    def readout(model: Any) -> Readout:
        native = family.readout(_inside(model))
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
        tokens=lambda model: family.tokens(_inside(model)),
        d_model=lambda model: family.d_model(_inside(model)),
        readout=readout,
        inputs=lambda model, x: family.inputs(_inside(model), x),
        strangers=lambda model: family.strangers(_inside(model)),
        refuses=lambda model: family.refuses(_inside(model)),
        any_size=lambda model: family.any_size(_inside(model)),
    )
