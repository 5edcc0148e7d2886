"""The images that a command is given by words: files, folders, names of datasets and of stimuli."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_mechinterp.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["image_data"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def image_data(
    given: Sequence[str], *, pairs: bool, n: int | None = None, options: Mapping[str, Any] | None = None
) -> Any:
    """Return what circuits take as images.

    Args:
        given: paths of image files; or one folder: of images, of folders of images named by their label, or
            of a dataset written by ``save_to_disk``; or ``photographs`` (two that scikit-learn ships),
            ``stimuli/NAME``, or the name of a dataset for ``datasets.load_dataset``.
        pairs: whether two files are a pair (clean, corrupted) instead of two images.
        n: how many of the first examples to take.
        options: for the stimuli or ``load_dataset`` (``split``, ...); ``split`` also names the split of a
            saved dataset. ``fit=True`` scales and crops the second of two files to the size of the first.

    Raises:
        DataError: there is no such file, folder or dataset, it holds no images, or two files of a pair differ
            in size.
    """
    options = dict(options or {})
    paths = [Path(entry) for entry in given]
    if given == ["photographs"]:
        from vit_mechinterp.circuits.images import sample_photographs

        both = list(sample_photographs().values())
        return _first_of((both[0], both[1]) if pairs else both, n)
    if len(given) > 1 or paths[0].is_file():
        from vit_mechinterp.circuits.images import open_image

        opened = [open_image(path) for path in paths]
        pair = pairs and len(opened) == 2
        return _first_of(_paired(opened, given, fit=bool(options.get("fit"))) if pair else opened, n)
    if paths[0].is_dir():
        data = _folder(paths[0], options, n)
    elif given[0].startswith("stimuli/"):
        from vit_mechinterp.stimuli import build

        if n is not None:
            options.setdefault("n", n)
        data = build(given[0].removeprefix("stimuli/"), **options)
    else:
        data = _named(given[0], options)
    return _first_of(_with_images(data, given[0]), n)


def _paired(images: list[Any], names: Sequence[str], *, fit: bool) -> tuple[Any, Any]:
    """Make two images a pair; one position of the model must mean one place in both."""
    from PIL import ImageOps

    clean, other = images
    if other.size != clean.size and not fit:
        raise DataError(
            f"{names[0]} has {clean.size[0]} x {clean.size[1]} pixels and {names[1]} {other.size[0]} x "
            f"{other.size[1]}, so one position of the model means two places. Bring both to one size first, "
            "or let the second be scaled and cropped: --set data.fit=true."
        )
    return clean, other if other.size == clean.size else ImageOps.fit(other, clean.size)


def _folder(folder: Path, options: Mapping[str, Any], n: int | None) -> Dataset:
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        from datasets import load_from_disk

        return _one_split(load_from_disk(str(folder)), options.get("split"), str(folder))
    within = {path: _images_in(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    labelled = {path.name: files for path, files in within.items() if files}
    files = _images_in(folder)
    if not files and not labelled:
        raise DataError(
            f"The folder {folder} holds no images ({', '.join(_SUFFIXES)}), neither itself nor in folders "
            "named by their label, and no dataset written by save_to_disk."
        )
    from datasets import ClassLabel, Dataset, Features, Image

    if files:
        chosen = list(map(str, files[:n]))
        return Dataset.from_dict({"image": chosen}, features=Features({"image": Image()}))
    pictures = [(path, index) for index, own in enumerate(labelled.values()) for path in own]
    if n is not None:
        # The first few of every label, not of the first label alone.
        turns = sorted(
            (turn, label, path)
            for label, own in enumerate(labelled.values())
            for turn, path in enumerate(own)
        )
        pictures = sorted(((path, label) for _, label, path in turns[:n]), key=lambda entry: entry[1])
    columns = {"image": [str(path) for path, _ in pictures], "label": [index for _, index in pictures]}
    return Dataset.from_dict(
        columns, features=Features({"image": Image(), "label": ClassLabel(names=list(labelled))})
    )


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())


def _named(name: str, options: Mapping[str, Any]) -> Dataset:
    from datasets import load_dataset

    try:
        data = load_dataset(name, **options)
    except Exception as error:  # hubs, caches and builders raise types of their own
        raise DataError(
            f"{name!r} is no image file or folder here, and no dataset could be loaded by that name "
            f"({type(error).__name__}: {error}). Give image files, a folder, 'photographs', 'stimuli/NAME', "
            "or the name of a dataset that is cached or can be reached."
        ) from error
    return _one_split(data, None, name)


def _one_split(data: Any, split: str | None, where: str) -> Dataset:
    from datasets import DatasetDict, IterableDatasetDict

    if not isinstance(data, (DatasetDict, IterableDatasetDict)):
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        raise DataError(f"{where} has the splits {', '.join(data)}; name one: --set data.split=NAME.")
    return data[split]


def _with_images(data: Dataset, where: str) -> Dataset:
    """Let the first column of images be called ``base`` where no column is."""
    from datasets import Image

    if "base" in data.column_names or "image" in data.column_names:
        return data
    pictured = [name for name, feature in data.features.items() if isinstance(feature, Image)]
    if not pictured:
        raise DataError(f"{where} has no column of images. Columns: {', '.join(data.column_names)}.")
    return data.rename_column(pictured[0], "base")


def _first_of(data: Any, n: int | None) -> Any:
    if n is None or isinstance(data, tuple) or len(data) <= n:
        return data
    if n < 1:
        raise DataError(f"-n {n} leaves no image.")
    return data.select(range(n)) if hasattr(data, "select") else data[:n]
