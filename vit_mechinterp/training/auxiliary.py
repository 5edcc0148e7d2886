"""The disentanglement loss: shape in one half of an object's embedding, colour in the other (Lepori et al.
2024).

Two linear probes, trained together with the model, read every object token: one predicts the shape from the
first half of the embedding, the other the colour from the second half. Their cross-entropies, averaged over
all object tokens of a batch, are added to the task's loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli.colors import N_COLORS
from vit_mechinterp.stimuli.shapes import N_SHAPES

__all__ = ["AuxiliaryLoss", "DisentanglementProbes"]


class AuxiliaryLoss(NamedTuple):
    """The two terms of the loss and the accuracy of each probe, over all object tokens of a batch."""

    shape: Float[Tensor, ""]
    color: Float[Tensor, ""]
    shape_accuracy: Float[Tensor, ""]
    color_accuracy: Float[Tensor, ""]


class DisentanglementProbes(nn.Module):
    """The two probes of the disentanglement loss.

    Args:
        d_model: width of the embedding, an even number.

    Raises:
        SpecError: the width cannot be halved.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        if d_model % 2:
            raise SpecError(
                f"The disentanglement loss halves the embedding, whose width is {d_model}: use an even width."
            )
        self.d_half = d_model // 2
        self.shape = nn.Linear(self.d_half, N_SHAPES)
        self.color = nn.Linear(self.d_half, N_COLORS)

    def forward(
        self,
        hidden: Float[Tensor, "batch token d_model"],
        tokens: Int64[Tensor, "batch object patch"],
        shape: Int64[Tensor, "batch object"],
        color: Int64[Tensor, "batch object"],
    ) -> AuxiliaryLoss:
        """Return the loss of the probes at the given tokens.

        Args:
            hidden: embeddings of all tokens.
            tokens: positions of each object's tokens along the token axis of ``hidden`` (prefix tokens
                counted).
            shape, color: the ids of each object.
        """
        n, n_objects, n_patches = tokens.shape
        index = tokens.reshape(n, -1, 1).expand(-1, -1, hidden.shape[-1])
        objects = hidden.gather(1, index).reshape(n * n_objects * n_patches, -1)
        shape_target = shape[..., None].expand_as(tokens).reshape(-1)
        color_target = color[..., None].expand_as(tokens).reshape(-1)
        shape_logits = self.shape(objects[:, : self.d_half])
        color_logits = self.color(objects[:, self.d_half :])
        with torch.no_grad():
            shape_accuracy = (shape_logits.argmax(-1) == shape_target).float().mean()
            color_accuracy = (color_logits.argmax(-1) == color_target).float().mean()
        return AuxiliaryLoss(
            shape=functional.cross_entropy(shape_logits, shape_target),
            color=functional.cross_entropy(color_logits, color_target),
            shape_accuracy=shape_accuracy,
            color_accuracy=color_accuracy,
        )
