"""Tensor files that carry a checksum of every tensor, so that a damaged one is made again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vit_mechinterp.engine.results.tensorfiles import checksum, read_tensors, writing

__all__ = ["read_sealed", "write_sealed"]

logger = logging.getLogger(__name__)


def write_sealed(path: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> None:
    """Write tensors, their checksums and some words beside them.

    Raises:
        OSError: the file cannot be written.
    """
    layout = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    sums = json.dumps({name: checksum(x) for name, x in tensors.items()})
    own = {key: str(value) for key, value in metadata.items()}
    with writing(path, layout, {"checksums": sums, **own}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def read_sealed(path: Path, *, check: bool = True) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors of a file, mapped, and its metadata; None if it is not there, or is damaged: then it is
    removed with a warning. Without ``check`` no checksum is looked at."""
    from safetensors import SafetensorError

    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path)
        sums = json.loads(metadata["checksums"])
        sound = not check or {name: checksum(x) for name, x in tensors.items()} == sums
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, LookupError):
        sound = False
    if sound:
        return tensors, metadata
    logger.warning("%s is damaged; it is dropped, and computed again.", path)
    path.unlink(missing_ok=True)
    return None
