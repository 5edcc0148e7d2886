"""Accuracy of a model on a fixed set of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from vit_mechinterp.stimuli.discrimination import KIND_NAMES

if TYPE_CHECKING:
    from vit_mechinterp.stimuli.discrimination import DiscriminationGenerator

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    module: nn.Module,
    generator: DiscriminationGenerator,
    n: int,
    *,
    batch_size: int = 128,
    progress: bool = False,
) -> dict[str, float]:
    """Evaluate a two-class model on the first ``n`` images of a generator, in eval mode (the mode is
    restored).

    Returns:
        ``loss``, ``accuracy``, ``accuracy_same``, and ``accuracy_different_both``, ``..._shape``,
        ``..._color``: the accuracy on images whose objects differ in both attributes, in shape only, in
        colour only.
    """
    from tqdm.auto import tqdm

    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    losses, correct, kinds = [], [], []
    try:
        batches = generator.batches(n, batch_size)
        for batch in tqdm(batches, total=-(-n // batch_size), desc="evaluate", disable=not progress):
            logits = module(batch.images().to(device)).float().cpu()
            losses.append(functional.cross_entropy(logits, batch.labels(), reduction="none"))
            correct.append((logits.argmax(-1) == batch.labels()).numpy())
            kinds.append(batch.different_kind)
    finally:
        module.train(was_training)
    hits, kind = np.concatenate(correct), np.concatenate(kinds)
    result = {"loss": float(torch.cat(losses).double().mean()), "accuracy": float(hits.mean())}
    for index, name in enumerate(KIND_NAMES):
        if (kind == index).any():
            result["accuracy_same" if name == "none" else f"accuracy_different_{name}"] = float(
                hits[kind == index].mean()
            )
    return result
