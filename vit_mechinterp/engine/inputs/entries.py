"""Single entries of a column: what kind each is, as numbers, as bytes, and in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_array", "bytes_of", "described", "is_picture"]


def is_picture(entry: Any) -> bool:
    """Whether an entry is a PIL image (PIL itself need not be imported)."""
    return hasattr(entry, "convert")


def as_array(entry: Any) -> Tensor | None:
    """An entry as a tensor; None if it holds no numbers, or lists of unequal length."""
    if isinstance(entry, Tensor):
        return entry
    try:
        array = np.asarray(entry)
        # Of a file that is mapped to be read, torch would warn that nobody may write there.
        return torch.as_tensor(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError):
        return None


def described(entry: Any) -> str:
    """An entry in a few words, however large it is."""
    if entry is None:
        return "None"
    if isinstance(entry, Tensor) or hasattr(entry, "dtype"):
        return f"{entry.dtype} of shape {tuple(entry.shape)}"
    if is_picture(entry):
        return f"a PIL image of {entry.size[0]} x {entry.size[1]} pixels"
    if len(text := repr(entry)) <= 40:
        return text
    size = f" of {len(entry)}" if hasattr(entry, "__len__") else ""
    return f"a {type(entry).__name__}{size}"


def bytes_of(entry: Any) -> bytes:
    """What an entry holds, as bytes for a digest: kind, shape and contents."""
    if is_picture(entry):
        # The pixels of a palette image are indices, which say nothing without the palette.
        picture = entry.convert("RGBA") if entry.mode == "P" else entry
        return f"{entry.mode}{entry.size}".encode() + bytes(picture.tobytes())
    if isinstance(entry, Tensor):
        raw = entry.detach().cpu().contiguous()
        return f"{tuple(raw.shape)}{raw.dtype}".encode() + raw.reshape(-1).view(torch.uint8).numpy().tobytes()
    try:
        array = np.asarray(entry)
    except ValueError:
        return repr(entry).encode()
    if array.dtype == object:
        return repr(entry).encode()
    return f"{array.shape}{array.dtype.kind}".encode() + np.ascontiguousarray(array).tobytes()
