"""What is refused before the first forward, because the results would mean nothing."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm

from vit_mechinterp.engine.bound import Bound
from vit_mechinterp.engine.data import Data
from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["check_images", "refuse_train_mode"]


def refuse_train_mode(vit: HookedViT) -> None:
    """Raise ExecutionError if the model is in train mode and would drop activations at random, or normalise
    them by the batch."""
    path = vit.dropout()
    if path is not None:
        raise ExecutionError(
            f"{type(vit.module).__name__} is in train mode and would drop activations at random (at {path}), "
            "so no two forwards could be compared. Call module.eval() first."
        )
    for path, part in vit.module.named_modules():
        if isinstance(part, _BatchNorm) and part.training:
            raise ExecutionError(
                f"{type(vit.module).__name__} is in train mode and would normalise by the images that happen "
                f"to share a forward, and change its statistics (at {path}). Call module.eval() first."
            )


def check_images(data: Data, bound: Bound) -> None:
    """Raise DataError before the first forward if an image column holds something else."""
    for column in sorted(bound.image_columns):
        data.check_images(column)
