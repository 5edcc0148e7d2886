"""A timm model inside another library's module: the timm row of what is inside, read through the wrapper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from vit_mechinterp.model.layout import Family, Port, Readout


def inside(
    family: Family, path: str, library: str, name: str, readout: Callable[[Any, Readout], Readout]
) -> Family:
    """The row of a timm family for modules of another library that hold one of its models at ``path``.

    ``readout`` makes the wrapper's readout of the wrapper and of the timm model's, whose paths are the
    wrapper's already.
    """

    def within(model: Any) -> nn.Module:
        module: nn.Module = getattr(model, path)
        return module

    def read(model: Any) -> Readout:
        native = family.readout(within(model))
        ports = {
            site: dataclasses.replace(port, path=f"{path}.{port.path}" if port.path else path)
            if isinstance(port, Port)
            else port
            for site, port in native.ports.items()
        }
        return readout(model, dataclasses.replace(native, ports=ports))

    return dataclasses.replace(
        family,
        name=f"{name}({family.name})",
        library=library,
        blocks=tuple(f"{path}.{blocks}" for blocks in family.blocks),
        tokens=lambda model: family.tokens(within(model)),
        d_model=lambda model: family.d_model(within(model)),
        readout=read,
        inputs=lambda model, x: family.inputs(within(model), x),
        strangers=lambda model: family.strangers(within(model)),
        refuses=lambda model: family.refuses(within(model)),
        any_size=lambda model: family.any_size(within(model)),
    )
