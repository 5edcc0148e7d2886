"""pyvene: an `IntervenableModel` with one `VanillaIntervention` per block output.

Every call removes all hooks of the model, and the constructor freezes it, so it gets a model of its own. A
model that pyvene does not know needs its components written out and interventions given as instances;
positions are full nested lists, since an int switches to a path that is wrong for later calls.

``group_key`` shares one source forward among the sites that are edited in the *same* run. A sweep edits one
site a run, so the documented way is a source for that site's group and None for the others;
``source_representations`` takes sources that were computed before, which plain hooks do here in one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ways"]


def ways(module: Any, data: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """A source forward per layer, in groups of one site each; or the sources given."""
    import pyvene as pv

    n = module.config.num_hidden_layers
    sites = [
        {
            "component": f"vit.layers[{layer}].output",
            "unit": "pos",
            "intervention": pv.VanillaIntervention(),
            "group_key": layer,
        }
        for layer in range(n)
    ]
    model = pv.IntervenableModel(pv.IntervenableConfig(sites), model=module)
    edited = (1 + data["edited"]).tolist()
    taken = (1 + data["source_tokens"]).tolist()
    rows = torch.arange(len(edited), device=data["base"].device)[:, None]
    columns = (1 + data["source_tokens"]).to(rows.device)

    def only(layer: int, value: Any) -> list[Any]:
        return [value if other == layer else None for other in range(n)]

    def grouped() -> Tensor:
        outputs = []
        for layer in range(n):
            _, output = model(
                {"pixel_values": data["base"]},
                only(layer, {"pixel_values": data["source"]}),
                {"sources->base": (only(layer, taken), only(layer, edited))},
            )
            outputs.append(output.logits)
        return torch.stack(outputs)

    def given() -> Tensor:
        kept: dict[int, Tensor] = {}
        handles = [
            block.register_forward_hook(lambda m, a, o, k=k: kept.__setitem__(k, o[rows, columns]))
            for k, block in enumerate(module.vit.layers)
        ]
        module(data["source"])
        for handle in handles:
            handle.remove()
        outputs = []
        for layer in range(n):
            _, output = model(
                {"pixel_values": data["base"]},
                None,
                {"sources->base": ([None] * n, only(layer, edited))},
                source_representations={model.sorted_keys[layer]: kept[layer]},
            )
            outputs.append(output.logits)
        return torch.stack(outputs)

    return {
        "pyvene, grouped sources": grouped,
        "pyvene, source_representations": given,
    }
