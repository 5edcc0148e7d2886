"""The disentanglement loss: shape in one half of an object's embedding, colour in the other (Lepori et al.
2024).

Two linear probes, trained together with the model, read every object token: one predicts the shape from the
first half of the embedding, the other the colour from the second half. Their cross-entropies, averaged over
all object tokens of a batch, are added to the task's loss. (The latest version of the authors' code does not
hand the probes to its optimiser, so they keep their first weights: ``TrainingConfig.freeze_probes``.)

Two more kinds of probes take their place where it is asked what the disentanglement itself does:
`RelationProbes` predict whether a pair of objects is the same from all its tokens at once, `IdentityProbe`
predicts which of the 256 objects a token shows from the whole embedding. All three are called alike, with the
embeddings of all tokens, where the objects are, and what they are; they work in any training loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.stimuli.colors import N_COLORS
from vit_mechinterp.stimuli.shapes import N_SHAPES

__all__ = [
    "AuxiliaryLoss",
    "DisentanglementProbes",
    "IdentityProbe",
    "ProbeLoss",
    "RelationProbes",
    "make_probes",
]


class AuxiliaryLoss(NamedTuple):
    """The two terms of the loss and the accuracy of each probe, over all object tokens of a batch."""

    shape: Float[Tensor, ""]
    color: Float[Tensor, ""]
    shape_accuracy: Float[Tensor, ""]
    color_accuracy: Float[Tensor, ""]

    @property
    def total(self) -> Float[Tensor, ""]:
        """What is added to the task's loss."""
        return self.shape + self.color

    def log(self) -> dict[str, Tensor]:
        """The numbers by the names of the log."""
        return {f"probe_{name}": value for name, value in self._asdict().items()}


class ProbeLoss(NamedTuple):
    """The loss of one kind of probe and its accuracy."""

    name: str
    total: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]

    def log(self) -> dict[str, Tensor]:
        """The numbers by the names of the log."""
        return {f"probe_{self.name}": self.total, f"probe_{self.name}_accuracy": self.accuracy}


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
        objects = _object_tokens(hidden, tokens).flatten(0, 2)
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


class RelationProbes(nn.Module):
    """Probes of a pair's relation, same or different, from the concatenated tokens of its two objects.

    With two pairs in an image (relational match to sample) each pair has a probe of its own. The loss is the
    mean cross-entropy over pairs.

    Args:
        d_model: width of the embedding.
        tokens_per_object: patches that an object covers.
        n_pairs: pairs of objects in an image.
    """

    def __init__(self, d_model: int, tokens_per_object: int, n_pairs: int) -> None:
        super().__init__()
        width = 2 * tokens_per_object * d_model
        self.relation = nn.ModuleList(nn.Linear(width, 2) for _ in range(n_pairs))

    def forward(
        self,
        hidden: Float[Tensor, "batch token d_model"],
        tokens: Int64[Tensor, "batch object patch"],
        shape: Int64[Tensor, "batch object"],
        color: Int64[Tensor, "batch object"],
    ) -> ProbeLoss:
        """Return the loss of the probes; arguments as for `DisentanglementProbes`."""
        objects = _object_tokens(hidden, tokens)
        pairs = objects.reshape(len(objects), len(self.relation), -1)
        logits = torch.stack([probe(pairs[:, k]) for k, probe in enumerate(self.relation)], dim=1)
        same = (shape[:, 0::2] == shape[:, 1::2]) & (color[:, 0::2] == color[:, 1::2])
        return _loss("relation", logits.flatten(0, 1), same.long().flatten())


class IdentityProbe(nn.Module):
    """A probe of the object, one of the 256, from the whole embedding of each of its tokens: the control.

    It asks for the same knowledge as `DisentanglementProbes`, in any part of the embedding.

    Args:
        d_model: width of the embedding.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.identity = nn.Linear(d_model, N_SHAPES * N_COLORS)

    def forward(
        self,
        hidden: Float[Tensor, "batch token d_model"],
        tokens: Int64[Tensor, "batch object patch"],
        shape: Int64[Tensor, "batch object"],
        color: Int64[Tensor, "batch object"],
    ) -> ProbeLoss:
        """Return the loss of the probe; arguments as for `DisentanglementProbes`."""
        target = (color * N_SHAPES + shape)[..., None].expand_as(tokens).flatten()
        return _loss("identity", self.identity(_object_tokens(hidden, tokens).flatten(0, 2)), target)


def make_probes(
    kind: str, d_model: int, *, tokens_per_object: int, n_pairs: int
) -> DisentanglementProbes | RelationProbes | IdentityProbe:
    """Make the probes of a kind: ``shape-color``, ``pair-relation`` or ``object-identity``.

    Raises:
        SpecError: there is no such kind, or the width does not fit it.
    """
    match kind:
        case "shape-color":
            return DisentanglementProbes(d_model)
        case "pair-relation":
            return RelationProbes(d_model, tokens_per_object, n_pairs)
        case "object-identity":
            return IdentityProbe(d_model)
    kinds = ("shape-color", "pair-relation", "object-identity")
    raise SpecError(f"There are no probes {kind!r}. Probes: {', '.join(kinds)}.{suggest(kind, kinds)}")


def _object_tokens(
    hidden: Float[Tensor, "batch token d_model"], tokens: Int64[Tensor, "batch object patch"]
) -> Float[Tensor, "batch object patch d_model"]:
    index = tokens.flatten(1)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index).reshape(*tokens.shape, -1)


def _loss(name: str, logits: Float[Tensor, "row class"], target: Int64[Tensor, " row"]) -> ProbeLoss:
    accuracy = (logits.detach().argmax(-1) == target).float().mean()
    return ProbeLoss(name, functional.cross_entropy(logits, target), accuracy)
