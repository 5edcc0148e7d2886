"""What circuits share that only read: their images, the outputs' directions, and means with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.result import provenance
from vit_mechinterp.circuits.statistics import bootstrap_interval
from vit_mechinterp.engine.binding.checks import refuse_train_mode
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.results.provenance import circumstances
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT

__all__ = [
    "class_names",
    "directed",
    "interval_columns",
    "merged_reasons",
    "outputs_shape",
    "read_from",
    "reading_data",
]


def reading_data(vit: HookedViT, data: Any, column: str, example: int = 0, *, progress: bool = True) -> Data:
    """Return the columns, with the images and the example to show checked, and random dropout refused.

    ``progress`` shows bars wherever going through a column takes longer than two seconds.

    Raises:
        SpecError: there is no such example; DataError: an image is none; ExecutionError: dropout is on.
    """
    refuse_train_mode(vit)
    columns = Data(data, vit, progress=progress)
    columns.check_images(column)
    if not 0 <= example < columns.n:
        raise SpecError(f"example={example} is out of range; there are {columns.n} images.")
    return columns


def outputs_shape(vit: HookedViT) -> tuple[int, ...]:
    """Return the shape of the output for one image, from one blank forward."""
    with torch.no_grad():
        return tuple(vit(vit.blank(1)).shape[1:])


def directed(
    vit: HookedViT, directions: Float[Tensor, "class d_output"] | None, what: str
) -> tuple[Tensor | None, int]:
    """Check the directions that outputs are read along, and return them with the number of classes.

    Raises:
        SpecError: the outputs are no vector, no classes and no directions are given, or these do not fit.
    """
    shape = outputs_shape(vit)
    if len(shape) != 1:
        raise SpecError(f"{what} needs one vector per image; this model gives {shape}.")
    if directions is None:
        if vit.layout.output != "logits" or shape[0] < 2:
            raise SpecError(
                f"{what} needs classes; this model gives {shape[0]} features ({vit.layout.output}). Give "
                f"directions [class, {shape[0]}], such as the text embeddings of class names."
            )
        return None, shape[0]
    directions = torch.as_tensor(directions)
    if directions.ndim != 2 or directions.shape[1] != shape[0] or not directions.is_floating_point():
        raise SpecError(
            f"directions has shape {tuple(directions.shape)}; this model's outputs have {shape[0]} entries, "
            f"so floating-point [class, {shape[0]}] fits."
        )
    return directions.to(vit.device, torch.float32), len(directions)


def class_names(names: Sequence[str] | None, n: int) -> list[str]:
    """Return one name per class, by default its number.

    Raises:
        SpecError: there are more or fewer.
    """
    if names is None:
        return [f"class {index}" for index in range(n)]
    if len(names) != n:
        raise SpecError(f"{len(names)} names are given for {n} classes; give one per class.")
    return list(names)


def merged_reasons(left_out: Mapping[str, str], n_layers: int) -> dict[str, str]:
    """Name a site once where every block lacks it for one reason."""
    merged: dict[str, str] = {}
    for name, reason in left_out.items():
        own = name.split(".", 2)[-1]
        everywhere = all(left_out.get(f"blocks.{layer}.{own}") == reason for layer in range(n_layers))
        merged[own if everywhere else name] = reason
    return merged


def interval_columns(
    values: Float[np.ndarray, "quantity example"],
    *,
    name: str = "value",
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return means over examples and the ends of their bootstrap intervals (NaN for one example)."""
    array = np.asarray(values, dtype=float)
    if array.shape[1] < 2:
        low = high = np.full(len(array), np.nan)
    else:
        low, high = bootstrap_interval(array, resamples=resamples, seed=seed)
    return {name: array.mean(axis=1), f"{name}_low": low, f"{name}_high": high}


def read_from(
    vit: HookedViT, columns: Data, names: Sequence[str], *records: Mapping[str, Any], **facts: Any
) -> dict[str, Any]:
    """Return the provenance of numbers that were read off a model: its weights, the columns read, the
    facts.
    """
    own = {
        "model": vit.fingerprint(),
        "model_source": vit.source or type(vit.module).__name__,
        "data": columns.fingerprint(names),
        "columns": sorted(set(names)),
        "examples": columns.n,
        "dtype": str(vit.dtype).removeprefix("torch."),
        **circumstances(vit),
    }
    return provenance(own, *records, **facts)
