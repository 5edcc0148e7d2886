"""What is refused before the first forward, because the results would mean nothing."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sized
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import ExecutionError, SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.meta import refuse_meta
from vit_mechinterp.spec import Site

__all__ = [
    "check_arguments",
    "check_batch_size",
    "check_folder",
    "check_heads",
    "check_images",
    "check_listed",
    "check_progress",
    "is_integer",
    "is_truth",
    "refuse_train_mode",
]


def check_arguments(vit: Any, store: Any = None, *, planned: bool = False) -> None:
    """Raise SpecError where a native model or a path stands for what wraps it, and, unless it is only
    ``planned``, ExecutionError where the model has no weights."""
    if not isinstance(vit, HookedViT):
        raise SpecError(
            f"vit is a wrapped model, not {type(vit).__name__}. Wrap it: vit_mechinterp.wrap(module)."
        )
    if isinstance(store, (str, Path)):
        raise SpecError(
            "store is an ActivationStore, not a path. Make one: "
            f"vit_mechinterp.ActivationStore({str(store)!r})."
        )
    if store is not None and not hasattr(store, "tiers"):
        raise SpecError(f"store is an ActivationStore or None, not {type(store).__name__}.")
    if not planned:
        refuse_meta(vit.module)


def check_progress(progress: Any) -> None:
    """Raise SpecError unless this is True or False: a text such as ``"no"`` would count as true."""
    if not isinstance(progress, (bool, np.bool_)):
        raise SpecError(f"progress is True or False, not {progress!r}.")


def check_folder(folder: Any, name: str) -> None:
    """Raise SpecError unless this is a path, or None."""
    if folder is not None and not isinstance(folder, (str, PathLike)):
        raise SpecError(f"{name} is the path of a folder or None, not {type(folder).__name__}.")
    if folder is not None and "\0" in str(folder):
        raise SpecError(f"{name} is no path: {str(folder)!r} holds a null character.")
    if folder == "":
        raise SpecError(f"{name} is an empty path; name a folder, '.' for the current one.")


def check_batch_size(batch_size: Any, *, auto: bool = True) -> None:
    """Raise SpecError unless this is a positive integer, or ``"auto"`` where that is possible."""
    if auto and isinstance(batch_size, str) and batch_size == "auto":
        return
    if not hasattr(batch_size, "__index__") or isinstance(batch_size, bool) or int(batch_size) < 1:
        kinds = "'auto' or a positive integer" if auto else "a positive integer"
        raise SpecError(f"batch_size is {kinds}, got {batch_size!r}.")


def check_listed(examples: Any, n: int) -> None:
    """Raise SpecError unless this is a list of something, or an array of one axis."""
    shape = tuple(getattr(examples, "shape", (0,)))
    if len(shape) > 1:
        raise SpecError(f"examples are one list of numbers, and these have shape {shape}.")
    is_list = isinstance(examples, Sized) and hasattr(examples, "__getitem__") and shape
    if isinstance(examples, (str, bytes, Mapping)) or not is_list:
        raise SpecError(f"examples={examples!r} is no list of numbers of examples, 0 to {n - 1}.")
    if isinstance(examples, Tensor) and examples.is_meta:
        raise SpecError("examples stand on the meta device, and so hold no numbers. Make them on the CPU.")


def check_heads(vit: HookedViT, site: Site, heads: tuple[int, ...] | None, where: str) -> None:
    """Raise SpecError unless the site has these heads."""
    if heads is None:
        return
    if not site.has_heads:
        raise SpecError(f"{where}: {site} has no head axis, so heads cannot be selected there.")
    shape = vit.sites()[str(site)].shape
    n_heads = shape[0] if site.is_attention_matrix else shape[1]
    if max(heads) >= n_heads:
        raise SpecError(
            f"{where}: head {max(heads)} is out of range; {site} has {n_heads} heads, 0 to {n_heads - 1}."
        )


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


def check_images(data: Data, bound: Bound, *, decode: bool = True) -> None:
    """Raise DataError before the first forward if an image column holds something else (encoded images:
    something that cannot be decoded, unless that is not tried)."""
    for column in sorted(bound.image_columns):
        data.check_images(column, decode=decode)


def is_integer(value: Any) -> bool:
    """Whether this is an integer, of whatever library; a truth value of Python's is one."""
    try:
        operator.index(value)
    except (TypeError, RuntimeError):
        return False
    return True


def is_truth(value: Any) -> bool:
    """Whether this is a truth value, of whatever library, as masks are made of."""
    return isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool)
