"""Linear probes trained by gradient descent, all on the same examples in the same steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from vit_mechinterp.circuits.training_settings import check_settings

__all__ = ["LinearProbes", "ProbeTraining", "train_probes"]


@dataclass(frozen=True)
class ProbeTraining:
    """How probes are trained; the defaults are those of Lepori et al. 2024.

    Attributes:
        epochs: passes over the examples.
        batch_size: examples per step.
        learning_rate, weight_decay: AdamW's.
        seed: of the first weights and the order of the examples.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, ("epochs", "batch_size"), ("learning_rate", "weight_decay", "seed"))


@dataclass(frozen=True)
class LinearProbes:
    """Several probes, each one linear layer.

    Attributes:
        weight: ``[probe, class, feature]``; a row is the direction of its class.
        bias: ``[probe, class]``.
    """

    weight: Float[Tensor, "probe class feature"]
    bias: Float[Tensor, "probe class"]

    def right(
        self, features: Sequence[Float[Tensor, "example feature"]], labels: Int[Tensor, " example"]
    ) -> Bool[Tensor, "probe example"]:
        """Return which examples every probe classifies rightly."""
        logits = [x @ w.T + b for x, w, b in zip(features, self.weight, self.bias, strict=True)]
        return torch.stack(logits).argmax(dim=-1) == labels


def train_probes(
    features: Sequence[Float[Tensor, "example feature"]],
    labels: Int[Tensor, " example"],
    training: ProbeTraining,
    *,
    device: torch.device | None = None,
    progress: bool = True,
) -> LinearProbes:
    """Train one probe on each of several sets of features of the same examples.

    No two share a parameter, and AdamW treats each parameter for itself, so every probe is trained as if it
    were alone: from the first weights of a linear layer under this seed, on batches in the same order.

    Args:
        features: one tensor per probe, equally wide.
        labels: classes from 0.
        training: the settings.
        device: where to train; the CPU if left out.
        progress: show a bar if it takes longer than two seconds.
    """
    n, width = features[0].shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        layer = nn.Linear(width, int(labels.max()) + 1)
    weight, bias = (
        nn.Parameter(first.detach().expand(len(features), *first.shape).clone().to(device))
        for first in (layer.weight, layer.bias)
    )
    optimizer = torch.optim.AdamW(
        [weight, bias], lr=training.learning_rate, weight_decay=training.weight_decay
    )
    order = torch.Generator().manual_seed(training.seed)
    steps = training.epochs * -(-n // training.batch_size)
    with torch.enable_grad(), tqdm(total=steps, desc="probes", delay=2.0, disable=not progress) as bar:
        for _ in range(training.epochs):
            for examples in torch.split(torch.randperm(n, generator=order), training.batch_size):
                x = torch.stack([own[examples] for own in features]).to(weight)
                logits = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
                wanted = labels[examples].to(weight.device).expand(len(features), -1)
                # The mean over each probe's examples, and the sum over probes, which share nothing.
                loss = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
                optimizer.zero_grad()
                torch.autograd.backward(loss / len(examples))
                optimizer.step()
                bar.update()
    return LinearProbes(weight.detach().cpu(), bias.detach().cpu())
