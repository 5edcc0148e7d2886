"""nnsight: traces of the model, stopped early where nothing behind is read.

Importing it adds methods to Python's `object` and wraps `Tensor.backward`, and a wrapped model's modules get
another ``forward``: it runs in a process of its own, on a model of its own. Traces must stand in a file,
since the body of a ``with`` block is read as source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ways"]


def ways(module: Any, data: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """A source trace per layer that stops behind it; or one source trace for all layers."""
    from nnsight import NNsight

    model: Any = NNsight(module)
    layers = range(module.config.num_hidden_layers)
    rows = torch.arange(len(data["base"]), device=data["base"].device)[:, None]
    edited, taken = (1 + data[name].to(rows.device) for name in ("edited", "source_tokens"))

    def patched(layer: int, new: Tensor) -> Tensor:
        block = model.vit.layers[layer]
        with model.trace(data["base"]):
            value = block.output.clone()
            value[rows, edited] = new
            block.output = value
            logits = model.output.logits.save()
        return logits  # noqa: RET504

    def stopped() -> Tensor:
        outputs = []
        for layer in layers:
            block = model.vit.layers[layer]
            with model.trace(data["source"]) as tracer:
                new = block.output[rows, taken].save()
                tracer.stop()
            outputs.append(patched(layer, new))
        return torch.stack(outputs)

    def cached() -> Tensor:
        kept: list[Any] = [None] * len(layers)
        with model.trace(data["source"]) as tracer:
            for layer in layers:
                kept[layer] = model.vit.layers[layer].output[rows, taken].save()
            tracer.stop()
        return torch.stack([patched(layer, kept[layer]) for layer in layers])

    return {
        "nnsight, a source trace per layer, tracer.stop()": stopped,
        "nnsight, one source trace": cached,
    }
