"""Accuracy of a model on a fixed set of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from vit_mechinterp.model.hooked import HookedViT

if TYPE_CHECKING:
    from vit_mechinterp.stimuli.batches import TaskGenerator

__all__ = ["Answers", "answers", "evaluate"]


class Answers(NamedTuple):
    """What a model says of every image, in order.

    Attributes:
        right: whether the answer is right ``[image]``.
        loss: cross-entropy ``[image]``.
        groups: for each kind of image that there is, which images are of it ``[image]``.
    """

    right: NDArray[np.bool_]
    loss: Float[Tensor, " image"]
    groups: dict[str, NDArray[np.bool_]]


@torch.no_grad()
def answers(
    model: nn.Module | HookedViT,
    generator: TaskGenerator[Any],
    n: int,
    *,
    batch_size: int = 128,
    progress: bool = False,
) -> Answers:
    """Ask a two-class model about the first ``n`` images of a generator, in eval mode (the mode is restored).

    Images are given to the model as the generator scales them, without resizing or cropping.
    """
    from tqdm.auto import tqdm

    module = model.module if isinstance(model, HookedViT) else model
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    losses, right, groups = [], [], []
    try:
        batches = generator.batches(n, batch_size)
        total = -(-n // batch_size)
        for batch in tqdm(batches, total=total, desc="evaluate", delay=2, disable=not progress):
            logits = model(batch.images().to(device)).float().cpu()
            losses.append(functional.cross_entropy(logits, batch.labels(), reduction="none"))
            right.append((logits.argmax(-1) == batch.labels()).numpy())
            groups.append(batch.groups())
    finally:
        module.train(was_training)
    members = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    present = {name: images for name, images in members.items() if images.any()}
    return Answers(np.concatenate(right), torch.cat(losses), present)


def evaluate(
    model: nn.Module | HookedViT,
    generator: TaskGenerator[Any],
    n: int,
    *,
    batch_size: int = 128,
    progress: bool = False,
) -> dict[str, float]:
    """Evaluate a two-class model on the first ``n`` images of a generator, as `answers` does.

    Returns:
        ``loss``, ``accuracy``, and ``accuracy_...`` of each kind of image that there is: ``same``,
        ``different_both``, ``different_shape``, ``different_color`` in discrimination,
        ``sample_same_display_different`` and so on in relational match to sample.
    """
    found = answers(model, generator, n, batch_size=batch_size, progress=progress)
    result = {"loss": float(found.loss.double().mean()), "accuracy": float(found.right.mean())}
    return result | {
        f"accuracy_{name}": float(found.right[images].mean()) for name, images in found.groups.items()
    }
