"""Labelled images for small classifiers: scikit-learn's digits, a set of the Hugging Face hub by name, or a
folder that `datasets` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vit_mechinterp.errors import DataError, SpecError, suggest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["IMAGE_SETS", "ImageSet", "image_set"]

_HUB: Final[dict[str, dict[str, Any]]] = {
    "cifar10": {"path": "uoft-cs/cifar10"},
    "cifar100": {"path": "uoft-cs/cifar100"},
    "svhn": {"path": "ufldl-stanford/svhn", "name": "cropped_digits"},
    "imagenet": {"path": "ILSVRC/imagenet-1k", "size": 64, "streams": True},
}
IMAGE_SETS = ("digits", *_HUB)
"""Names that `image_set` takes. Only ``digits`` needs no network."""

_SIZE = 32
_IMAGES = ("image", "img", "pixel_values")
_LABELS = ("label", "fine_label", "labels", "class", "target")
_HELD_OUT = ("test", "validation", "valid", "val")
_SHUFFLED = 10_000
"""Images among which a streamed set is shuffled."""


@dataclass(frozen=True)
class ImageSet:
    """Images ``[n, 3, size, size]``, of mean 0 and standard deviation 1 over the training images, and
    classes."""

    name: str
    train: Float[Tensor, "image 3 size size"]
    train_labels: Int64[Tensor, " image"]
    test: Float[Tensor, "image 3 size size"]
    test_labels: Int64[Tensor, " image"]
    n_classes: int

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.train.shape[-1]


def image_set(
    name: str | Path = "digits", *, seed: int = 0, limit: int | None = None, size: int | None = None
) -> ImageSet:
    """Read a set of labelled images.

    Args:
        name: one of `IMAGE_SETS`: ``digits`` (1,797 images of 8 x 8 pixels that scikit-learn ships, a fifth
            of which are held out), or ``cifar10``, ``cifar100``, ``svhn``, ``imagenet`` from the hub
            (ImageNet is streamed, and asks for a login); or a folder: what ``save_to_disk`` wrote, or images
            in ``train/CLASS`` and ``test/CLASS``, parquet files and whatever else ``load_dataset`` reads.
            Columns are found by their features: an image, and a class (``label``, ``fine_label``, ...).
        seed: seeds the split of the digits, and which images are read under a limit.
        limit: read at most that many images of either split, drawn at random.
        size: height and width; larger images are cut to a square and scaled. By default 32, ImageNet 64, and
            8 for the digits, which are never scaled.

    Raises:
        SpecError: there is no such set or folder, or the limit or size is not positive; DataError: the set
            cannot be read, or lacks a split, an image column or a label column; the message says what it has.
    """
    for option, value in (("limit", limit), ("size", size)):
        if value is not None and value < 1:
            raise SpecError(f"{option}={value} is not positive.")
    if name == "digits":
        parts = _digits(seed)
    elif name in _HUB:
        usual = _HUB[str(name)].get("size", _SIZE)
        parts = _read(_from_hub(str(name)), str(name), seed, limit, size or usual)
    elif Path(name).is_dir():
        parts = _read(_from_folder(Path(name)), str(name), seed, limit, size or _SIZE)
    else:
        raise SpecError(
            f"There is no image set or folder {str(name)!r}. Image sets: {', '.join(IMAGE_SETS)}."
            f"{suggest(str(name), IMAGE_SETS)}"
        )
    (train, train_labels), (test, test_labels), n_classes = parts
    mean, std = float(train.mean()), float(train.std())
    images = (torch.from_numpy(np.ascontiguousarray((x - mean) / max(std, 1e-6))) for x in (train, test))
    labels = (torch.as_tensor(np.asarray(y)).long() for y in (train_labels, test_labels))
    return ImageSet(Path(name).name, next(images), next(labels), next(images), next(labels), n_classes)


def _digits(seed: int) -> Any:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.repeat(digits.images[:, None].astype("float32") / 16, 3, axis=1)
    train, test, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.2, random_state=seed, stratify=digits.target
    )
    return (train, train_labels), (test, test_labels), 10


def _from_hub(name: str) -> Mapping[str, Dataset | IterableDataset]:
    from datasets import load_dataset

    facts = _HUB[name]
    try:
        return dict(load_dataset(facts["path"], facts.get("name"), streaming=facts.get("streams", False)))
    # Whatever hub, network or file system raise, the reader needs to know what was asked for.
    except Exception as error:
        raise DataError(
            f"The image set {name!r} ({facts['path']} on the Hugging Face hub) cannot be read: {error} "
            "Without a network, name a folder that holds it (see image_set); a set with conditions asks for "
            "`hf auth login`; scikit-learn's digits are always there."
        ) from error


def _from_folder(folder: Path) -> Mapping[str, Dataset]:
    from datasets import Dataset, load_dataset, load_from_disk

    try:
        stored = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
        data = load_from_disk(str(folder)) if stored else load_dataset(str(folder))
    except Exception as error:
        raise DataError(
            f"The folder {folder} is no data set that `datasets` reads: {error} It holds what save_to_disk "
            "wrote, or images in train/CLASS and test/CLASS, or parquet files."
        ) from error
    return {"train": data} if isinstance(data, Dataset) else dict(data)


def _read(splits: Mapping[str, Any], name: str, seed: int, limit: int | None, size: int) -> Any:
    """Images and labels of the training and the first held-out split whose labels are known."""
    if "train" not in splits:
        raise DataError(f"The image set {name!r} has no split 'train'. Splits: {', '.join(splits)}.")
    image, label, n_classes = _columns(splits["train"], name)
    train = _arrays(splits["train"], image, label, seed, limit, size)
    for split in (split for split in _HELD_OUT if split in splits):
        test = _arrays(splits[split], image, label, seed, limit, size)
        # Some sets keep the labels of their test images to themselves.
        if len(test[1]) and min(test[1]) >= 0:
            return train, test, n_classes or int(max(*train[1], *test[1])) + 1
    raise DataError(
        f"The image set {name!r} has no held-out split with labels ({', '.join(_HELD_OUT)}). Splits: "
        f"{', '.join(splits)}."
    )


def _columns(data: Any, name: str) -> tuple[str, str, int | None]:
    """The image column, the label column, and the number of classes where the features say."""
    from datasets import ClassLabel, Image, Value

    features: Mapping[str, Any] = data.features or {}
    images = [c for c, f in features.items() if isinstance(f, Image)]
    classes = [c for c, f in features.items() if isinstance(f, ClassLabel)]
    whole = [c for c, f in features.items() if isinstance(f, Value) and "int" in f.dtype and c in _LABELS]
    image, label = _chosen(images, _IMAGES), _chosen([*classes, *whole], _LABELS)
    if image is None or label is None:
        held = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
        lacking = "image" if image is None else "label"
        wanted = "of type Image" if image is None else "of type ClassLabel, or of integers called label"
        raise DataError(
            f"The image set {name!r} has no {lacking} column {wanted}, or several of equal right. "
            f"Columns: {held or 'unknown'}."
        )
    return image, label, features[label].num_classes if label in classes else None


def _chosen(found: Sequence[str], names: Sequence[str]) -> str | None:
    """The only column, or the one whose name comes first."""
    if len(found) == 1:
        return found[0]
    return next((column for column in names if column in found), None)


def _arrays(data: Any, image: str, label: str, seed: int, limit: int | None, size: int) -> Any:
    from datasets import Dataset
    from PIL.ImageOps import fit

    if isinstance(data, Dataset):
        if limit is not None and limit < len(data):
            # The first images of a sorted set would all be of one class.
            data = data.select(sorted(np.random.default_rng(seed).permutation(len(data))[:limit].tolist()))
    else:
        data = data.shuffle(seed=seed, buffer_size=_SHUFFLED)
        data = data if limit is None else data.take(limit)
    images, labels = [], []
    for row in data.select_columns([image, label]):
        images.append(np.asarray(fit(row[image].convert("RGB"), (size, size)), dtype="float32"))
        labels.append(int(row[label]))
    pixels = np.stack(images) if images else np.zeros((0, size, size, 3), "float32")
    return pixels.transpose(0, 3, 1, 2) / 255, labels
