"""How many images pass through the model together for a store, and what one of them takes."""

from __future__ import annotations

from collections.abc import Collection

import torch

from vit_mechinterp.engine.scheduling.footprint import forward_size, read_size
from vit_mechinterp.engine.store.forward import Wanted
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["image_bytes", "kept_bytes", "rows_by_default"]


def rows_by_default(vit: HookedViT) -> int:
    """Images per forward: the same on every machine of one kind, so that what one stores another finds."""
    if vit.layout.family.one_image is not None:
        return 1
    pixels = torch.Size(vit.layout.tokens.input_shape).numel()
    per_image = max(vit.layout.tokens.n_tokens * vit.layout.d_model, pixels)
    return max(1, (2**24 if vit.device.type == "cuda" else 2**20) // per_image)


def image_bytes(vit: HookedViT, reads: Collection[Wanted], dtype: torch.dtype) -> int:
    """Bytes that an image takes on its way through the model, with what is kept of it until it is stored."""
    element = torch.finfo(vit.dtype).bits // 8
    sites = [read.site for read in reads if read is not None]
    return element * forward_size(vit, sites) + kept_bytes(vit, reads, dtype)


def kept_bytes(vit: HookedViT, reads: Collection[Wanted], dtype: torch.dtype) -> int:
    """Bytes that are kept of an image."""
    size = max(torch.finfo(vit.dtype).bits // 8, dtype.itemsize)
    return size * sum(read_size(vit, read) for read in reads if read is not None)
