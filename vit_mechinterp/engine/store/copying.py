"""Items that leave a block: picked, and put into their places, on whatever device these are."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import contiguous

__all__ = ["copy_items", "pick"]

_LARGE = 4096
"""Bytes of an item from which on it is worth a copy of its own."""


def pick(tensor: Tensor, items: IntArray) -> Tensor:
    """Some items of a block: a view where they are consecutive."""
    if not len(items):
        return tensor[:0]
    span = contiguous(items)
    return tensor[span] if span is not None else tensor[torch.as_tensor(items, device=tensor.device)]


def copy_items(source: Tensor, items: IntArray, out: Tensor, places: IntArray) -> None:
    """Put items of a block into places of ``out``."""
    if not len(items):
        return
    if source.device == out.device and source.device.type == "cpu" and source[0].nbytes >= _LARGE:
        # One copy each, where gathering and scattering would make two.
        rows, given = _bytes(out), _bytes(source)
        for place, item in zip(places.tolist(), items.tolist(), strict=True):
            rows[place] = given[item]
        return
    target = contiguous(places)
    found = pick(source, items).to(out.device)
    out[torch.as_tensor(places, device=out.device) if target is None else target] = found


def _bytes(items: Tensor) -> NDArray[np.uint8]:
    """The bytes of every item, ``[item, byte]``, where they are."""
    found: NDArray[np.uint8] = items.view(len(items), -1).view(torch.uint8).numpy()
    return found
