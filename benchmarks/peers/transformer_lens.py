"""TransformerLens 4: a `TransformerBridge` around the HuggingFace model.

``boot_transformers`` replaces submodules of the model that it is given and sets its attention to eager, so it
must have a model of its own. ``start_at_layer`` would spare a run the blocks below its edit, but is refused
for vision models; every run goes through the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["bridge", "ways"]


def bridge(module: Any) -> Any:
    """The model as a `TransformerBridge`; the model is changed."""
    from transformer_lens.model_bridge import TransformerBridge

    parameter = next(module.parameters())
    return TransformerBridge.boot_transformers(
        "google/vit-base-patch16-224",  # only a name: architecture and sizes are read from the model's config
        hf_model=module,
        device=str(parameter.device),
        dtype=parameter.dtype,
    )


def ways(module: Any, data: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """``run_with_cache`` of all block outputs once, then ``run_with_hooks`` for every layer."""
    model = bridge(module)
    layers = range(model.cfg.n_layers)
    names = [f"blocks.{layer}.hook_out" for layer in layers]
    rows = torch.arange(len(data["base"]), device=data["base"].device)[:, None]
    edited, taken = (1 + data[name].to(rows.device) for name in ("edited", "source_tokens"))

    def sweep() -> Tensor:
        _, cache = model.run_with_cache(data["source"], names_filter=names)
        outputs = []
        for name in names:

            def swap(value: Tensor, hook: Any, new: Tensor = cache[name][rows, taken]) -> Tensor:
                value = value.clone()
                value[rows, edited] = new
                return value

            outputs.append(model.run_with_hooks(data["base"], fwd_hooks=[(name, swap)]))
        return torch.stack(outputs)

    return {"TransformerLens, run_with_cache and run_with_hooks": sweep}
