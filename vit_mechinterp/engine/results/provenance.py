"""Where results came from: digests of spec, model, data and tensors, chunks, device and versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from vit_mechinterp.engine.binding.identity import columns_read
from vit_mechinterp.engine.binding.tensors import digest_of
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TensorRef
from vit_mechinterp.spec.digest import digest

__all__ = ["circumstances", "provenance_of", "versions"]

PACKAGES = ("vit-mechinterp", "torch", "timm", "transformers", "datasets", "numpy")


def provenance_of(
    vit: HookedViT, data: Data, schedule: Schedule, tensors: Mapping[TensorRef, Tensor], halvings: int
) -> dict[str, Any]:
    """Everything that decides the bits of the results, as a JSON-ready mapping.

    ``halvings`` counts how often the rows per forward were halved because memory ran out.
    """
    used, readout = columns_read(data, schedule.bound), schedule.bound.readout
    own = {} if readout is None else {"readout": readout.spec.model_dump(mode="json")}
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
        "dtype": str(vit.dtype).removeprefix("torch."),
        **own,
        **circumstances(vit),
    }


def circumstances(vit: HookedViT) -> dict[str, Any]:
    """What may change the last bits of results: device, threads, versions, compiled blocks and autocast."""
    kind = vit.device.type
    found = {"device": str(vit.device), "threads": torch.get_num_threads(), "versions": versions()}
    if vit.compiled is not None:
        found["compiled"] = {name: str(value) for name, value in vit.compiled.options.items()}
    if torch.is_autocast_enabled(kind):
        found["autocast"] = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
    return found


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; of those that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
