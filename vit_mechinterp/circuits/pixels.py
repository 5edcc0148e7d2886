"""From the model's input back to pixels: what a change of the input means in an image.

Values are shares of the range from black to white, 0 to 1. Where a model's preprocessing states its mean and
standard deviation they are inverted; otherwise the range of the given images stands for black and white.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.errors import VitMechInterpError
from vit_mechinterp.model.hooked import HookedViT

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PixelScale"]


@dataclass(frozen=True)
class PixelScale:
    """``input = (value - mean) / std`` per channel, for values of 0 to 1."""

    mean: Float[Tensor, "channel 1 1"]
    std: Float[Tensor, "channel 1 1"]

    @classmethod
    def of(cls, vit: HookedViT, x: Float[Tensor, "batch *image"]) -> PixelScale:
        """Read the scale off the model's preprocessing, or off images where it does not say or they do not
        fit it.
        """
        low, high = x.min(), x.max()
        try:
            config = vit.preprocess.config
        except VitMechInterpError:
            config = {}
        mean, std = (config.get(name, config.get(f"image_{name}")) for name in ("mean", "std"))
        if mean is not None and std is not None:
            scale = cls(*(torch.tensor(v, device=x.device).float().reshape(3, 1, 1) for v in (mean, std)))
            values = scale.values(x)
            if values.min() > -0.05 and values.max() < 1.05:
                return scale
        ones = torch.ones(3, 1, 1, device=x.device)
        span = (high - low).float().clamp_min(1e-12)
        return cls(-low.float() / span * ones, ones / span)

    def values(self, x: Float[Tensor, "*batch channel height width"]) -> Float[Tensor, "*batch c h w"]:
        """Return pixel values of inputs."""
        return x.float() * self.std + self.mean

    def change(self, x: Float[Tensor, "*batch channel height width"]) -> Float[Tensor, "*batch c h w"]:
        """Return what a difference of inputs is in pixel values."""
        return x.float() * self.std

    def image(self, x: Float[Tensor, "channel height width"]) -> Image:
        """Return the input as a PIL image; values beyond black and white are cut off."""
        from PIL import Image

        values = (self.values(x).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        return Image.fromarray(values.cpu().numpy())
