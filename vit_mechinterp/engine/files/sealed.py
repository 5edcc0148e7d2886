"""Documents and tensor files that carry checksums of all that they say, so that damage is seen."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vit_mechinterp.engine.files.tensorfiles import checksum, read_tensors, writing
from vit_mechinterp.spec.digest import digest

__all__ = ["open_document", "read_sealed", "seal_document", "write_sealed"]

logger = logging.getLogger(__name__)


def seal_document(document: Mapping[str, Any]) -> bytes:
    """A document as JSON, with its digest."""
    plain = json.loads(json.dumps(document))
    return json.dumps({"document": plain, "digest": digest(plain)}, indent=2).encode()


def open_document(text: bytes) -> dict[str, Any] | None:
    """The document that was sealed; None if it is damaged, or something else."""
    try:
        found = json.loads(text)
        document = found["document"]
        return document if isinstance(document, dict) and found["digest"] == digest(document) else None
    except (ValueError, LookupError, TypeError):
        return None


def write_sealed(path: Path, tensors: Mapping[str, Tensor], of: str, **words: Any) -> None:
    """Write tensors, what they are of, some words about them, and checksums of all.

    Raises:
        OSError: the file cannot be written.
    """
    layout = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    metadata = {"of": of, **{key: str(value) for key, value in words.items()}}
    with writing(path, layout, {**metadata, "seal": _seal(tensors, metadata)}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def read_sealed(
    path: Path, of: str, *, check: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors of a file, mapped, and the words about them; None if it is not there, or is damaged, or of
    something else: then it is removed with a warning. Without ``check`` no checksum is looked at.

    Raises:
        OSError: it cannot be read, whatever it holds; it stays.
    """
    from safetensors import SafetensorError

    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path)
        seal = metadata.pop("seal")
        sound = metadata["of"] == of and (not check or seal == _seal(tensors, metadata))
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, LookupError):
        sound = False
    if sound:
        return tensors, metadata
    logger.warning("%s is damaged; it is dropped, and computed again.", path)
    path.unlink(missing_ok=True)
    return None


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A digest of everything that a file says."""
    own = {name: [str(x.dtype), list(x.shape), checksum(x)] for name, x in tensors.items()}
    return digest({"tensors": own, "words": dict(metadata)})
