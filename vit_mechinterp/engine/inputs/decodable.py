"""Images that cannot be decoded, all of them found before anything is computed from the others.

A file that was cut short opens like any other, and fails when its pixels are read. So every image is decoded
once, JPEGs at a fraction of their size: milliseconds each, on several threads, and once per dataset and
process, however many experiments follow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

from tqdm.auto import tqdm

from vit_mechinterp.engine.inputs.stored import stored_bytes

__all__ = ["damaged_files", "damaged_picture", "said_of_damaged"]

_AT_ONCE = 256
"""Encoded images in memory."""
_NAMED = 10
"""Damaged images of which a message says what is wrong; the others are listed."""

_SOUND: set[str] = set()
"""Fingerprints of the columns of which every image was decoded in this process."""


def damaged_files(
    stored: Any, column: str, fingerprint: str | None, *, progress: bool = False
) -> dict[int, str]:
    """Return what is wrong with the encoded images of a dataset, by example; of sound ones nothing.

    Args:
        stored: a dataset with a column of undecoded images.
        column: that column.
        fingerprint: of the column; that all is well is remembered under it. None remembers nothing.
        progress: show a bar if it takes longer than two seconds.
    """
    if fingerprint is not None and fingerprint in _SOUND:
        return {}
    found: dict[int, str] = {}
    bar = tqdm(total=len(stored), desc=f"decoding {column}", unit="image", delay=2.0, disable=not progress)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(stored), _AT_ONCE):
            entries = stored[first : first + _AT_ONCE][column]
            for example, trouble in enumerate(pool.map(_trouble, entries), first):
                if trouble:
                    found[example] = trouble
            bar.update(len(entries))
    if fingerprint is not None and not found:
        _SOUND.add(fingerprint)
    return found


def damaged_picture(picture: Any) -> str:
    """Return what is wrong with a PIL image, whose file need not have been read; nothing if it is sound."""
    if 0 in picture.size:
        return f"{picture.size[0]} x {picture.size[1]} pixels"
    try:
        picture.load()
    except Exception as error:  # decoders raise types of their own
        return _placed(getattr(picture, "filename", ""), _reason(error))
    return ""


def said_of_damaged(found: Mapping[int, str], column: str, n: int, trouble: str = "cannot be decoded") -> str:
    """Return the message that names damaged images."""
    named = "; ".join(f"example {example} ({found[example]})" for example in list(found)[:_NAMED])
    if others := list(found)[_NAMED:]:
        named += f"; and examples {', '.join(map(str, others))}"
    one = len(found) == 1
    return (
        f"Column {column!r}: {len(found)} of {n} images {trouble}: {named}. Repair or replace "
        f"{'it' if one else 'them'}, or leave {'that example' if one else 'those examples'} out."
    )


def _trouble(entry: Any) -> str:
    import PIL.Image

    path = entry.get("path") or ""
    try:
        encoded = stored_bytes(entry)
    except OSError as error:
        return _placed(path, _reason(error))
    if encoded is None:
        # What lies elsewhere only the dataset can fetch.
        return "" if "://" in path else _placed(path, "there is no such file" if path else "it is missing")
    if not encoded:
        return _placed(path, "the file is empty")
    try:
        with PIL.Image.open(BytesIO(encoded)) as picture:
            picture.draft("RGB", (64, 64))
            picture.load()
    except Exception as error:  # decoders raise types of their own
        return _placed(path, _reason(error))
    return ""


def _placed(path: str, reason: str) -> str:
    return f"{path}: {reason}" if path else reason


def _reason(error: Exception) -> str:
    import PIL

    if isinstance(error, PIL.UnidentifiedImageError):
        return "no image in a format that Pillow knows"
    return str(error) or type(error).__name__
