"""Where results came from: digests of spec, model, data and tensors, chunks, device and versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from vit_mechinterp.engine.bound import Bound
from vit_mechinterp.engine.data import Data
from vit_mechinterp.engine.schedule import Schedule
from vit_mechinterp.engine.tensors import digest_of
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TensorRef
from vit_mechinterp.spec.digest import digest

__all__ = ["provenance_of", "versions"]

PACKAGES = ("vit-mechinterp", "torch", "timm", "transformers", "datasets", "numpy")


def provenance_of(
    vit: HookedViT, data: Data, schedule: Schedule, tensors: Mapping[TensorRef, Tensor], halvings: int
) -> dict[str, Any]:
    """Everything that decides the bits of the results, as a JSON-ready mapping.

    ``halvings`` counts how often the rows per forward were halved because memory ran out.
    """
    # Labels are in the table of the results, so they count as read.
    used = sorted({*columns_used(schedule.bound, data), *data.labels()})
    return {
        "spec": digest([run.run.model_dump(mode="json") for run in schedule.bound.runs]),
        "model": vit.fingerprint(),
        "model_source": vit.source or type(vit.module).__name__,
        "data": data.fingerprint(used),
        "columns": used,
        "tensors": digest_of(tensors),
        "examples": data.n,
        "chunk": schedule.chunk,
        "rows_per_forward": schedule.width,
        "halvings": halvings,
        "device": str(vit.device),
        "dtype": str(vit.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def columns_used(bound: Bound, data: Data) -> list[str]:
    """Names of the columns that the runs read."""
    named: set[str] = set()
    for run in bound.runs:
        _names(run.run.model_dump(mode="json"), named)
    return sorted(named.intersection(data.columns))


def _names(document: Any, found: set[str]) -> None:
    """Every string value in a document: what it names as a column is among them."""
    if isinstance(document, str):
        found.add(document)
    elif isinstance(document, Mapping):
        for value in document.values():
            _names(value, found)
    elif isinstance(document, list):
        for value in document:
            _names(value, found)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
