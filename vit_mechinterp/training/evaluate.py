"""Accuracy of a model on a fixed set of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from vit_mechinterp.stimuli.batches import TaskGenerator

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    module: nn.Module,
    generator: TaskGenerator[Any],
    n: int,
    *,
    batch_size: int = 128,
    progress: bool = False,
) -> dict[str, float]:
    """Evaluate a two-class model on the first ``n`` images of a generator, in eval mode (the mode is
    restored).

    Returns:
        ``loss``, ``accuracy``, and ``accuracy_...`` of each kind of image that there is: ``same``,
        ``different_both``, ``different_shape``, ``different_color`` in discrimination,
        ``sample_same_display_different`` and so on in relational match to sample.
    """
    from tqdm.auto import tqdm

    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    losses, correct, groups = [], [], []
    try:
        batches = generator.batches(n, batch_size)
        for batch in tqdm(batches, total=-(-n // batch_size), desc="evaluate", disable=not progress):
            logits = module(batch.images().to(device)).float().cpu()
            losses.append(functional.cross_entropy(logits, batch.labels(), reduction="none"))
            correct.append((logits.argmax(-1) == batch.labels()).numpy())
            groups.append(batch.groups())
    finally:
        module.train(was_training)
    hits = np.concatenate(correct)
    result = {"loss": float(torch.cat(losses).double().mean()), "accuracy": float(hits.mean())}
    for name in groups[0]:
        members = np.concatenate([group[name] for group in groups])
        if members.any():
            result[f"accuracy_{name}"] = float(hits[members].mean())
    return result
