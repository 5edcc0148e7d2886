"""From scenes (which objects, where) to pixels, and from pixels to the tensors that models take.

Every object has a Gaussian texture: noise of standard deviation 10 around its colour, per pixel and channel,
clipped to 0 .. 250, drawn anew for every object of every image, so two objects that are the same are not the
same pixels. The background is white.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from vit_mechinterp.stimuli.colors import COLOR_MEANS
from vit_mechinterp.stimuli.geometry import Geometry
from vit_mechinterp.stimuli.shapes import N_SHAPES, shape_masks
from vit_mechinterp.stimuli.streams import Stream

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "NORMALIZATION",
    "Normalization",
    "Scenes",
    "object_gallery",
    "render",
    "shape_gallery",
    "to_image_column",
    "to_images",
    "to_tensor",
]

WHITE = 255
TEXTURE_SD = 10.0
BRIGHTEST = 250


@dataclass(frozen=True)
class Normalization:
    """How pixel values become model inputs: ``(value / 255 - mean) / std`` per channel."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


NORMALIZATION = Normalization()


@dataclass(frozen=True)
class Scenes:
    """What n images show.

    Attributes:
        shape: shape ids ``[n, objects]``.
        color: colour ids ``[n, objects]``.
        corner: corners of the objects' cells, x and y in pixels ``[n, objects, 2]``.
        shift: shifts of the objects inside their cells, x and y in pixels ``[n, objects, 2]``.
    """

    shape: NDArray[np.int64]
    color: NDArray[np.int64]
    corner: NDArray[np.int64]
    shift: NDArray[np.int64]


def render(
    scenes: Scenes, geometry: Geometry, stream: Stream
) -> UInt8[np.ndarray, "image channel height width"]:
    """Draw scenes: uint8 pixels ``[n, 3, canvas, canvas]``; the texture comes from ``stream``."""
    n, n_objects = scenes.shape.shape
    size = geometry.drawn
    texture = stream.normal(TEXTURE_SD, n, n_objects, 3, size, size)
    texture += COLOR_MEANS[scenes.color][..., None, None]
    masks = shape_masks(size)[scenes.shape][:, :, None]
    blocks = np.where(masks, texture.clip(0, BRIGHTEST).astype(np.uint8), np.uint8(WHITE))

    pixels = np.full((n, 3, geometry.canvas, geometry.canvas), WHITE, dtype=np.uint8)
    start = scenes.corner + scenes.shift
    columns = start[:, :, 0, None] + np.arange(size)
    rows = start[:, :, 1, None] + np.arange(size)
    pixels[
        np.arange(n)[:, None, None, None, None],
        np.arange(3)[:, None, None],
        rows[:, :, None, :, None],
        columns[:, :, None, None, :],
    ] = blocks
    return pixels


def to_tensor(
    pixels: UInt8[np.ndarray, "image channel height width"], normalization: Normalization = NORMALIZATION
) -> Float[Tensor, "image channel height width"]:
    """Normalise pixels in float32, with the same operations in the same order as torchvision's ToTensor and
    Normalize (equal bits).
    """
    mean = torch.tensor(normalization.mean, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(normalization.std, dtype=torch.float32).view(3, 1, 1)
    return torch.from_numpy(pixels).to(torch.float32).div_(255).sub_(mean).div_(std)


def to_images(pixels: UInt8[np.ndarray, "image channel height width"]) -> list[Image.Image]:
    """Turn pixels into PIL images."""
    from PIL import Image

    return [Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in pixels]


def to_image_column(
    pixels: UInt8[np.ndarray, "image channel height width"], *, progress: bool = False
) -> list[dict[str, Any]]:
    """Encode pixels (as PNG) for an image column of a dataset; a bar shows if it takes over two seconds."""
    from datasets import Image
    from tqdm.auto import tqdm

    encode = Image().encode_example
    images = tqdm(to_images(pixels), desc="images", unit="image", delay=2, disable=not progress)
    return [encode(image) for image in images]


def object_gallery(
    objects: Sequence[tuple[int, int]], cell: int = 32, *, seed: int = 0
) -> list[Image.Image]:
    """Draw objects, each (shape id, colour id), alone and centred in its cell: PIL images of ``cell`` x
    ``cell`` pixels, for figures.
    """
    geometry = Geometry(canvas=2 * cell, patch=cell, cell=cell)
    ids = np.asarray(objects, dtype=np.int64)[:, None]
    zeros = np.zeros((len(ids), 1, 2), dtype=np.int64)
    scenes = Scenes(
        shape=ids[..., 0], color=ids[..., 1], corner=zeros, shift=zeros + geometry.max_shift // 2
    )
    return to_images(render(scenes, geometry, Stream(seed, "gallery"))[:, :, :cell, :cell])


def shape_gallery(cell: int = 32, *, color: int = 4, seed: int = 0) -> list[Image.Image]:
    """Draw every shape of training once, by id, in one colour: 16 images as `object_gallery` makes them."""
    return object_gallery([(shape, color) for shape in range(N_SHAPES)], cell, seed=seed)
