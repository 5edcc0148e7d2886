"""Labelled images for small classifiers: scikit-learn's digits, or a set of the Hugging Face hub by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vit_mechinterp.errors import SpecError, suggest

__all__ = ["IMAGE_SETS", "ImageSet", "image_set"]

_HUB: Final[dict[str, dict[str, Any]]] = {
    "cifar10": {"path": "uoft-cs/cifar10", "image": "img", "label": "label", "test": "test", "size": 32},
    "cifar100": {"path": "uoft-cs/cifar100", "image": "img", "label": "fine_label", "test": "test",
                 "size": 32},
    "svhn": {"path": "ufldl-stanford/svhn", "name": "cropped_digits", "image": "image", "label": "label",
             "test": "test", "size": 32},
    "imagenet": {"path": "ILSVRC/imagenet-1k", "image": "image", "label": "label", "test": "validation",
                 "size": 64},
}  # fmt: skip
IMAGE_SETS = ("digits", *_HUB)
"""Names that `image_set` takes. Only ``digits`` needs no network."""


@dataclass(frozen=True)
class ImageSet:
    """Images ``[n, 3, size, size]``, of mean 0 and standard deviation 1 over the training images, and
    classes."""

    name: str
    train: Float[Tensor, "image 3 size size"]
    train_labels: Int64[Tensor, " image"]
    test: Float[Tensor, "image 3 size size"]
    test_labels: Int64[Tensor, " image"]

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.train.shape[-1]

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return int(self.train_labels.max()) + 1


def image_set(name: str = "digits", *, seed: int = 0, limit: int | None = None) -> ImageSet:
    """Read a set of labelled images.

    Args:
        name: one of `IMAGE_SETS`: ``digits`` (1,797 images of 8 x 8 pixels that scikit-learn ships, a fifth
            of which are held out), or ``cifar10``, ``cifar100``, ``svhn``, ``imagenet`` (scaled to 64 x 64)
            from the hub.
        seed: seeds the split of the digits.
        limit: read at most that many images of either split of a set of the hub.

    Raises:
        SpecError: there is no such set.
    """
    if name == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = np.repeat(digits.images[:, None].astype("float32") / 16, 3, axis=1)
        train, test, train_labels, test_labels = train_test_split(
            images, digits.target, test_size=0.2, random_state=seed, stratify=digits.target
        )
    elif name in _HUB:
        train, train_labels = _from_hub(name, "train", limit)
        test, test_labels = _from_hub(name, _HUB[name]["test"], limit)
    else:
        raise SpecError(
            f"There is no image set {name!r}. Image sets: {', '.join(IMAGE_SETS)}.{suggest(name, IMAGE_SETS)}"
        )
    mean, std = float(train.mean()), float(train.std())
    return ImageSet(
        name,
        *(torch.from_numpy(np.ascontiguousarray((train - mean) / std)), torch.as_tensor(train_labels).long()),
        *(torch.from_numpy(np.ascontiguousarray((test - mean) / std)), torch.as_tensor(test_labels).long()),
    )


def _from_hub(name: str, split: str, limit: int | None) -> tuple[Any, Any]:
    from datasets import load_dataset

    facts = _HUB[name]
    part = "" if limit is None else f"[:{limit}]"
    data = load_dataset(facts["path"], facts.get("name"), split=f"{split}{part}")
    size = (facts["size"], facts["size"])
    images = [
        np.asarray(image.convert("RGB").resize(size), dtype="float32") for image in data[facts["image"]]
    ]
    return np.stack(images).transpose(0, 3, 1, 2) / 255, np.asarray(data[facts["label"]])
