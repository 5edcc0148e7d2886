"""A document that can be run from the folder of its results: what it names by relative path goes along."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.spec import Experiment

if TYPE_CHECKING:
    from torch import Tensor

    from vit_mechinterp.model import HookedViT

__all__ = ["results_folder", "save_portable"]

TENSORS = "tensors"
"""Folder of the tensor files, inside the folder of the results."""


def results_folder(out: str | Path) -> Path:
    """Create a folder, and try to write into it.

    Raises:
        ExecutionError: nothing can be written there.
    """
    folder = Path(out).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise ExecutionError(
            f"Results cannot be written into {folder}: {reason}. Choose another folder."
        ) from None
    return folder


def save_portable(
    experiment: Experiment,
    folder: Path,
    *,
    vit: HookedViT | None = None,
    has_own_data: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``experiment.yaml`` so that it gives the same results from any working folder.

    Tensor files are copied into ``tensors/`` and referred to with their SHA-256; folders of models and data
    become absolute paths.

    Args:
        experiment: what was run.
        folder: the folder of the results.
        vit: the model that stood in for the one that the document names; a module of the user's own has no
            name, so the document then names none.
        has_own_data: other data stood in for those that the document names, so that it then names none.
        tensors: tensors that stood in for those that the document names, or were added; saved along.
    """
    document = experiment.model_dump(mode="json", exclude_defaults=True)
    if vit is not None:
        document["model"] = vit.origin
    elif experiment.model is not None:
        document["model"] = absolute_model(experiment)
    if has_own_data:
        document["data"] = None
    elif experiment.data is not None and experiment.data.saved is not None:
        document["data"]["saved"] = str(experiment.resolve(experiment.data.saved).resolve())
    own = dict(tensors or {})
    document["tensors"] = {
        **{name: ref for name, ref in document.get("tensors", {}).items() if name not in own},
        **_saved(own, folder),
    }
    for part in ("tensors", "runs"):
        document[part] = _with_copies(document[part], experiment, folder)
    path = folder / "experiment.yaml"
    Experiment.model_validate({key: value for key, value in document.items() if value}).to_yaml(path)
    return path


def absolute_model(experiment: Experiment) -> str:
    """The model that a document names, its folder (relative to the document) as an absolute path."""
    assert experiment.model is not None
    library, _, name = experiment.model.partition("/")
    if not name.startswith((".", "~")):
        return experiment.model
    return f"{library}/{experiment.resolve(name).resolve()}"


def _saved(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    if not tensors:
        return {}
    import torch
    from safetensors.torch import save

    contents = {
        name: torch.as_tensor(tensor).detach().cpu().contiguous().clone() for name, tensor in tensors.items()
    }
    (folder / TENSORS).mkdir(exist_ok=True)
    content = save(contents)
    path = folder / TENSORS / f"given-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
    path.write_bytes(content)
    return {name: {"file": str(path), "key": name} for name in contents}


def _with_copies(value: Any, experiment: Experiment, folder: Path) -> Any:
    """The same document with every reference to a tensor file leading to a copy in the folder."""
    if isinstance(value, list):
        return [_with_copies(item, experiment, folder) for item in value]
    if not isinstance(value, dict):
        return value
    if {"file", "key"} <= value.keys() <= {"name", "file", "key", "sha256"}:
        path = experiment.resolve(value["file"]).resolve()
        return {**value, **_copied(path, folder)} if path.is_file() else {**value, "file": str(path)}
    return {key: _with_copies(item, experiment, folder) for key, item in value.items()}


def _copied(path: Path, folder: Path) -> dict[str, str]:
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    own = folder / TENSORS
    if path.parent != own:
        own.mkdir(exist_ok=True)
        # Files of one name in two folders stay two files; a copy of a copy keeps its name.
        target = own / f"{path.stem.removesuffix(f'-{sha256[:8]}')}-{sha256[:8]}{path.suffix}"
        if not target.exists():
            shutil.copyfile(path, target)
        path = target
    return {"file": f"{TENSORS}/{path.name}", "sha256": sha256}
