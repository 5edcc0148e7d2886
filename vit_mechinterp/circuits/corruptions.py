"""Corrupted images: what an image is compared with when there is no second photograph.

All corruptions act on the model's own input, behind its resize and crop, so that a shuffled patch is a patch
of the model and both images of a pair line up token by token. Each is a frozen value with a seed; equal
values give equal images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.errors import DataError, SpecError, suggest
from vit_mechinterp.model.layout import TokenLayout

__all__ = [
    "CORRUPTIONS",
    "AnotherImage",
    "Blur",
    "Corruption",
    "Flat",
    "Grey",
    "Noise",
    "PatchShuffle",
    "corruption_of",
]

Pixels: TypeAlias = Float[Tensor, "example *frames 3 height width"]

Corruption: TypeAlias = Callable[[Tensor, TokenLayout], Tensor]
"""From the model's inputs ``[example, 3, height, width]`` (videos: with frames) and its token layout to
corrupted inputs of the same shape."""


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur; ``patches`` is its standard deviation in sides of a patch."""

    patches: float = 0.5

    def __call__(self, pixels: Pixels, layout: TokenLayout) -> Pixels:
        """Blur every frame of every image."""
        from torchvision.transforms.v2.functional import gaussian_blur

        sigma = self.patches * max(layout.patch_size)
        # Reflection at the border needs a kernel that is smaller than the image.
        reach = min(round(3 * sigma), min(pixels.shape[-2:]) // 2 - 1)
        blurred: Tensor = gaussian_blur(pixels, [2 * max(reach, 1) + 1] * 2, [sigma, sigma])
        return blurred


@dataclass(frozen=True)
class PatchShuffle:
    """The patches of every image in another order, of its own for every image, the same in all frames."""

    seed: int = 0

    def __call__(self, pixels: Pixels, layout: TokenLayout) -> Pixels:
        """Move every patch to another place of the grid."""
        rows, columns = layout.grid[-2:]
        height, width = layout.patch_size
        draw = torch.Generator().manual_seed(self.seed)
        shuffled = pixels.clone()
        covered = pixels[..., : rows * height, : columns * width]
        for example, image in enumerate(covered):
            patches = image.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
            cells = patches.movedim((-4, -2), (0, 1)).flatten(0, 1)
            cells = cells[torch.randperm(rows * columns, generator=draw).to(cells.device)]
            moved = cells.unflatten(0, (rows, columns)).movedim((0, 1), (-4, -2))
            shuffled[example, ..., : rows * height, : columns * width] = moved.flatten(-4, -3).flatten(-2, -1)
        return shuffled


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on every pixel; ``scale`` is its share of the image's own standard deviation."""

    scale: float = 1.0
    seed: int = 0

    def __call__(self, pixels: Pixels, layout: TokenLayout) -> Pixels:
        """Add noise to every image."""
        draw = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(pixels.shape, generator=draw).to(pixels)
        spread = pixels.flatten(1).std(dim=1).reshape(-1, *[1] * (pixels.ndim - 1))
        return pixels + self.scale * spread * noise


@dataclass(frozen=True)
class Grey:
    """The image without its colours: every channel is the mean of the three."""

    def __call__(self, pixels: Pixels, layout: TokenLayout) -> Pixels:
        """Take the colours away."""
        return pixels.mean(dim=-3, keepdim=True).expand_as(pixels).clone()


@dataclass(frozen=True)
class Flat:
    """One colour all over: the mean colour of the image."""

    def __call__(self, pixels: Pixels, layout: TokenLayout) -> Pixels:
        """Take everything but the mean colour away."""
        return pixels.mean(dim=(-2, -1), keepdim=True).expand_as(pixels).clone()


@dataclass(frozen=True)
class AnotherImage:
    """The next image of the dataset in a seeded order; no image is its own."""

    seed: int = 0

    def __call__(self, pixels: Pixels, layout: TokenLayout) -> Pixels:
        """Give every image another one of the batch."""
        n = len(pixels)
        if n < 2:
            raise DataError("Another image needs at least two images; there is one. Add some, or blur it.")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        partner = torch.empty_like(order)
        partner[order] = order.roll(1)
        return pixels[partner.to(pixels.device)]


CORRUPTIONS: dict[str, Corruption] = {
    "blur": Blur(),
    "shuffle": PatchShuffle(),
    "noise": Noise(),
    "grey": Grey(),
    "flat": Flat(),
    "another": AnotherImage(),
}
"""Corruptions by their short names, with their defaults."""


def corruption_of(value: str | Corruption) -> Corruption:
    """Return the corruption that a name stands for, or the callable itself.

    Raises:
        SpecError: it is neither; the names are listed.
    """
    if isinstance(value, str):
        if value not in CORRUPTIONS:
            raise SpecError(
                f"There is no corruption {value!r}.{suggest(value, CORRUPTIONS)} Corruptions: "
                f"{', '.join(CORRUPTIONS)}, or a function of (pixels, token layout)."
            )
        return CORRUPTIONS[value]
    if not callable(value):
        raise SpecError(f"A corruption is a name or a function of (pixels, token layout), not {value!r}.")
    return value
