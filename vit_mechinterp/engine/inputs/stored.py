"""Images of a ``datasets.Dataset`` as they are stored: looked at without decoding their pixels."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from vit_mechinterp.errors import DataError

__all__ = [
    "first_null",
    "oriented_size",
    "refuse_other_datasets",
    "stored_bytes",
    "stored_fingerprint",
    "stored_images",
]

_MAY_BE_TURNED = (b"eXIf", b"exif", b"adobe.xmp")
"""Of a PNG that says how it is to be turned, one stands in the file."""


def refuse_other_datasets(data: Any) -> None:
    """Raise DataError for what is neither one dataset nor columns: several splits, or a stream."""
    splits = list(data) if isinstance(data, Mapping) else []
    if splits and all(hasattr(data[name], "column_names") for name in splits):
        raise DataError(
            f"Data is one dataset, and this {type(data).__name__} holds several; name a split: "
            f"{', '.join(map(str, splits))} (data[{splits[0]!r}])."
        )
    if type(data).__name__ == "IterableDataset" or (
        hasattr(data, "column_names") and not hasattr(data, "__len__")
    ):
        raise DataError(
            f"Data of type {type(data).__name__} has no length and no order to go back to; experiments read "
            "examples more than once. Load it without streaming, or take what you need: "
            "datasets.Dataset.from_list(list(data.take(n)))."
        )


def stored_images(data: Any, column: str) -> Any:
    """A dataset's image column as encoded files, undecoded; None if the column is something else.

    A column of a dataset that stands in a mapping, ``{"base": dataset["image"]}``, is one too.
    """
    if isinstance(data, Mapping):
        source, name = _column_of(data.get(column))
        found = None if source is None else stored_images(source, name)
        return found if found is None or name == column else found.rename_column(name, column)
    feature: Any = (getattr(data, "features", None) or {}).get(column)
    plain = getattr(data, "format", {"type": None})["type"] is None
    if type(feature).__name__ != "Image" or not getattr(feature, "decode", False) or not plain:
        return None
    encoded = type(feature)(mode=feature.mode, decode=False)
    return data.select_columns([column]).cast_column(column, encoded)


def stored_fingerprint(data: Any, column: str) -> str | None:
    """What tells a dataset's column from any other, by the fingerprint that the library gave to the dataset;
    None if there is none.
    """
    source, name = _column_of(data.get(column)) if isinstance(data, Mapping) else (data, column)
    found = getattr(source, "_fingerprint", None)
    return None if found is None else f"{found} {name}"


def _column_of(entries: Any) -> tuple[Any, str]:
    """The dataset and the name of a column that was taken from it, without its entries having been read."""
    source = getattr(entries, "source", None)
    return (source, entries.column_name) if hasattr(source, "select_columns") else (None, "")


def first_null(stored: Any, column: str) -> int | None:
    """The first example without an image, found in Arrow's own table."""
    table = stored.data.column(column)
    if table.null_count == 0:
        return None
    nulls = table.is_null().to_numpy()
    if stored._indices is not None:
        nulls = nulls[stored._indices.column(0).to_numpy()]
    return int(nulls.argmax()) if nulls.any() else None


def stored_bytes(entry: Any) -> bytes | None:
    """The encoded file of an undecoded image of a dataset; None where it lies in no file of this machine."""
    if not isinstance(entry, Mapping):
        return None
    if entry.get("bytes") is not None:
        return bytes(entry["bytes"])
    path = entry.get("path")
    return Path(path).read_bytes() if path is not None and Path(path).is_file() else None


def oriented_size(encoded: bytes) -> tuple[int, int]:
    """``(width, height)`` of an encoded image as it is shown, from its header; EXIF may turn it."""
    import PIL.ExifTags
    import PIL.Image

    picture = PIL.Image.open(BytesIO(encoded))
    width, height = picture.size
    # PIL decodes a PNG to look for EXIF, which may stand behind the pixels.
    if picture.format == "PNG" and not any(mark in encoded for mark in _MAY_BE_TURNED):
        return width, height
    turned = picture.getexif().get(PIL.ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)
