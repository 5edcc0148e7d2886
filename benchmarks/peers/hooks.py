"""Plain PyTorch hooks, one run at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ways"]


def ways(module: Any, data: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The source forward anew for every layer, or once in all."""
    blocks = module.vit.layers
    rows = torch.arange(len(data["base"]), device=data["base"].device)[:, None]
    # On the device once: an index on the host would be copied at every use.
    edited, taken = (1 + data[name].to(rows.device) for name in ("edited", "source_tokens"))

    def swap(new: Tensor) -> Callable[..., Tensor]:
        def hook(block: object, args: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[rows, edited] = new
            return output

        return hook

    def sources(layers: range) -> dict[int, Tensor]:
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            return lambda block, args, output: kept.__setitem__(layer, output[rows, taken])

        handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
        module(data["source"])
        for handle in handles:
            handle.remove()
        return kept

    def edited_run(layer: int, new: Tensor) -> Tensor:
        handle = blocks[layer].register_forward_hook(swap(new))
        logits: Tensor = module(data["base"]).logits
        handle.remove()
        return logits

    def anew() -> Tensor:
        return torch.stack(
            [edited_run(n, sources(range(n, n + 1))[n]) for n in range(len(blocks))]
        )

    def cached() -> Tensor:
        kept = sources(range(len(blocks)))
        return torch.stack([edited_run(n, kept[n]) for n in range(len(blocks))])

    return {"plain hooks, a source forward per layer": anew, "plain hooks, source cached": cached}
