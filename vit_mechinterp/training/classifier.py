"""A small ViT trained on labelled images: a plain loop for experiments of minutes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from vit_mechinterp.model.positional import positional_attention
from vit_mechinterp.training.image_sets import ImageSet

__all__ = ["ClassifierSettings", "answers", "small_vit", "train_classifier"]


@dataclass(frozen=True)
class ClassifierSettings:
    """Size of the model and of its training.

    Attributes:
        patch: side of a patch in pixels.
        width, depth, heads: of the ViT; its MLPs are twice as wide as it is.
        steps, batch_size: of training.
        learning_rate: the highest of a one-cycle schedule, for AdamW.
        weight_decay: of AdamW.
    """

    patch: int = 2
    width: int = 48
    depth: int = 3
    heads: int = 3
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05


def small_vit(images: ImageSet, settings: ClassifierSettings, *, positional: bool, seed: int) -> nn.Module:
    """Return an untrained timm ViT for the images, or the same converted to positional attention."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    module: nn.Module = VisionTransformer(
        img_size=images.size,
        patch_size=settings.patch,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        mlp_ratio=2.0,
        num_classes=images.n_classes,
    )
    return positional_attention(module) if positional else module


def train_classifier(
    module: nn.Module, images: ImageSet, settings: ClassifierSettings, *, seed: int = 0, progress: bool = True
) -> nn.Module:
    """Train in place with AdamW on cross-entropy, batches drawn at random; return the module in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.steps
    )
    module.train()
    for _ in tqdm(range(settings.steps), desc="training", unit="step", delay=2, disable=not progress):
        chosen = torch.randint(len(images.train), (settings.batch_size,), generator=generator)
        loss = functional.cross_entropy(module(images.train[chosen]), images.train_labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return module.eval()


@torch.no_grad()
def answers(
    module: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256
) -> Bool[Tensor, " image"]:
    """Return which images are classified rightly."""
    parts = [module(part).argmax(-1) for part in torch.split(images, batch_size)]
    right: Tensor = torch.cat(parts).cpu() == labels.cpu()
    return right
