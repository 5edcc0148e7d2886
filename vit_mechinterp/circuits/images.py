"""The images that a circuit is given: two photographs, lists of pairs or of images, folders, datasets.

Everything becomes columns that the engine reads: ``base`` and, where a circuit compares, ``source``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vit_mechinterp.circuits.corruptions import Corruption, corruption_of
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError
from vit_mechinterp.model.hooked import HookedViT

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

__all__ = ["image_column", "image_pairs", "model_view", "open_image", "sample_photographs"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_AT_ONCE = 64
"""Images that are preprocessed and corrupted in one go."""


def image_pairs(
    images: Any,
    vit: HookedViT,
    *,
    corruption: str | Corruption | None = None,
    base: str = "base",
    source: str = "source",
    progress: bool = True,
) -> Any:
    """Return columns of pairs: clean images in ``base``, images to compare them with in ``source``.

    Args:
        images: one of

            * two images: a tuple ``(clean, corrupted)``;
            * pairs: a list of such tuples;
            * a ``datasets.Dataset`` or a mapping with the columns ``base`` and ``source``;
            * with ``corruption``: one image, a list, a folder, or data with the column ``base`` (or
              ``image``).

            An image is a PIL image, a path to one, or a float tensor of the model's input size.
        vit: the model that takes them.
        corruption: how to make the second image of the first: ``"blur"``, ``"shuffle"``, ``"noise"``,
            ``"grey"``, ``"flat"``, ``"another"`` (the next image), or a value of
            `vit_mechinterp.circuits.corruptions`.
        base, source: names of the columns.
        progress: show a bar where looking at the images takes longer than two seconds.

    Returns:
        A mapping of columns, or the dataset itself where it has both columns.

    Raises:
        DataError: the images are none of these, one cannot be decoded, or the images of a pair differ in
            size, so that one position means two places.
    """
    if corruption is not None:
        data = image_column(images, vit, column=base)
        pixels = _pixels(data, vit, base, progress)
        corrupted = corruption_of(corruption)(pixels, vit.layout.tokens)
        if corrupted.shape != pixels.shape:
            raise DataError(
                f"The corruption made {tuple(corrupted.shape)} of images {tuple(pixels.shape)}; the shape "
                "must stay."
            )
        return _with_column(data, source, corrupted)
    if _has_columns(images):
        data = _renamed(images, base)
        Data(data, vit).require(base, "the clean images")
        hint = "the corrupted images (or name a corruption, such as corruption='blur')"
        Data(data, vit).require(source, hint)
    else:
        pairs = _as_pairs(images)
        data = {base: [open_image(a) for a, _ in pairs], source: [open_image(b) for _, b in pairs]}
    _same_sizes(data, vit, base, source, progress)
    return data


def image_column(images: Any, vit: HookedViT, *, column: str = "base") -> Any:
    """Return data with an image column.

    Args:
        images: one image, a list of images, a stacked float tensor, the path of an image or of a folder of
            images (in order of name), or a dataset or mapping with the column (or one called ``image``).
            Files are decoded when they are needed, however many there are.
        vit: the model that takes them.
        column: name of the column.

    Raises:
        DataError: there is no image.
    """
    if _has_columns(images):
        data = _renamed(images, column)
        Data(data, vit).require(column, "the images")
        return data
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        files = sorted(p for p in Path(images).iterdir() if p.suffix.lower() in _SUFFIXES)
        if not files:
            raise DataError(f"The folder {images} holds no image ({', '.join(_SUFFIXES)}).")
        return _of_files(files, column)
    if isinstance(images, Tensor) and images.ndim > len(vit.layout.tokens.input_shape):
        return {column: images}
    entries = list(images) if isinstance(images, (list, tuple)) else [images]
    if not entries:
        raise DataError("There is no image: the list is empty.")
    if len(entries) > 1 and all(isinstance(entry, (str, Path)) for entry in entries):
        return _of_files(entries, column)
    return {column: [open_image(entry) for entry in entries]}


def open_image(entry: Any) -> Any:
    """Return a PIL image or a tensor as it is, and read the image at a path, upright.

    Raises:
        DataError: there is no readable image at the path, or the entry is no image.
    """
    if isinstance(entry, Tensor) or hasattr(entry, "convert"):
        return entry
    if not isinstance(entry, (str, Path)):
        raise DataError(
            f"An image is a PIL image, a path or a float tensor of the model's input size, not "
            f"{type(entry).__name__}."
        )
    import PIL.Image
    import PIL.ImageOps

    try:
        with PIL.Image.open(entry) as image:
            return PIL.ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise types of their own
        raise DataError(
            f"There is no readable image at {entry} ({error}). Repair or replace it, or leave it out."
        ) from None


def _of_files(files: Sequence[str | Path], column: str) -> Dataset:
    """A column of image files, which are read when they are wanted."""
    from datasets import Dataset, Features, Image

    return Dataset.from_dict({column: [str(file) for file in files]}, features=Features({column: Image()}))


def sample_photographs() -> dict[str, Image]:
    """Return the two photographs that scikit-learn ships, ``china`` and ``flower``, of 640 x 427 pixels."""
    import PIL.Image
    from sklearn.datasets import load_sample_image

    return {name: PIL.Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}


def model_view(vit: HookedViT, data: Any, column: str = "base", example: int = 0) -> Image:
    """Return what the model sees of an image: behind its resize and crop, in the image's own colours.

    The colours are those of the normalisation's inverse where the model's preprocessing says what it is;
    otherwise, and for tensors of other ranges, the values stretched to black and white.
    """
    from PIL import Image

    pixels = Data(data, vit).images(column, [example])[0].float().cpu()
    pixels = pixels.reshape(-1, *pixels.shape[-3:])[0]
    entry = next(iter(Data(data, vit).values(column, [example])))
    if hasattr(entry, "convert"):
        config = vit.preprocess.config
        mean = config.get("mean", config.get("image_mean"))
        std = config.get("std", config.get("image_std"))
        if mean is not None and std is not None:
            values = pixels * torch.tensor(std).reshape(3, 1, 1) + torch.tensor(mean).reshape(3, 1, 1)
            if values.min() > -0.05 and values.max() < 1.05:
                return Image.fromarray(_bytes(values.clamp(0, 1)))
    low, high = pixels.min(), pixels.max()
    return Image.fromarray(_bytes((pixels - low) / (high - low).clamp(min=1e-12)))


def _bytes(values: Tensor) -> Any:
    return (values * 255).round().byte().permute(1, 2, 0).numpy()


def _has_columns(images: Any) -> bool:
    return isinstance(images, Mapping) or hasattr(images, "column_names")


def _renamed(data: Any, column: str) -> Any:
    """Let the column that image folders call ``image`` stand for a missing one."""
    names = list(data) if isinstance(data, Mapping) else list(data.column_names)
    if column in names or "image" not in names:
        return data
    if isinstance(data, Mapping):
        return {column if name == "image" else name: values for name, values in data.items()}
    return data.rename_column("image", column)


def _as_pairs(images: Any) -> list[tuple[Any, Any]]:
    if isinstance(images, (tuple, list)) and len(images) == 2 and not _is_pair(images[0]):
        return [(images[0], images[1])]
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)) and len(images) > 0:
        odd = next((index for index, entry in enumerate(images) if not _is_pair(entry)), None)
        if odd is None:
            return [(a, b) for a, b in images]
        raise DataError(
            f"Entry {odd} of the list is no pair of images (clean, corrupted), but "
            f"{type(images[odd]).__name__}. For single images name a corruption, such as 'blur'."
        )
    raise DataError(
        f"{type(images).__name__} is no pair of images: give two images, a list of pairs, or data with the "
        "columns base and source; for single images name a corruption, such as 'blur'."
    )


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, (tuple, list)) and len(entry) == 2


def _same_sizes(data: Any, vit: HookedViT, base: str, source: str, progress: bool) -> None:
    columns = Data(data, vit, progress=progress)
    here, there = columns.original_sizes(base), columns.original_sizes(source)
    if here is None or there is None:
        return
    for example, (one, other) in enumerate(zip(here, there, strict=True)):
        if one != other:
            raise DataError(
                f"Pair {example}: {base!r} has {one[0]} x {one[1]} pixels and {source!r} {other[0]} x "
                f"{other[1]}, so one position of the model means two places. Bring both to one size first, "
                "for example with PIL.ImageOps.fit(image, size)."
            )


def _pixels(data: Any, vit: HookedViT, column: str, progress: bool) -> Tensor:
    columns = Data(data, vit, progress=progress)
    columns.check_images(column)
    spans = [range(i, min(i + _AT_ONCE, columns.n)) for i in range(0, columns.n, _AT_ONCE)]
    return torch.cat([columns.images(column, span).float().cpu() for span in spans])


def _with_column(data: Any, column: str, pixels: Tensor) -> Any:
    if isinstance(data, Mapping):
        return {**data, column: pixels}
    names = [name for name in data.column_names if name != column]
    return {**{name: data[name] for name in names}, column: pixels}
