"""How much memory the engine may hold, unless something else is asked for."""

from __future__ import annotations

import torch

from vit_mechinterp.model.hooked import HookedViT

__all__ = ["BUDGET", "FREED", "WAITING", "budget_of"]

BUDGET = 2 * 1024**3
"""Bytes held beside the model on a CPU."""
WAITING, FREED = 16, 32
"""Of a budget that was given, one part in so many is for images that wait for the model, and for memory that
was freed and not returned."""
SHARE = 0.4
"""On a GPU, the share of the free memory."""


def budget_of(vit: HookedViT) -> int:
    """Bytes held beside the model."""
    if vit.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(vit.device)
        # What torch keeps of freed memory is free: a second call has the budget of the first.
        kept = torch.cuda.memory_reserved(vit.device) - torch.cuda.memory_allocated(vit.device)
        return int(SHARE * (free + kept))
    return BUDGET
