"""The state that a training resumes from: weights, optimiser and progress in one file. Never pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit_mechinterp.errors import TensorFileError

__all__ = ["load_state", "save_state", "write_json"]


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


def save_state(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write everything that training needs to go on: weights and optimiser moments as safetensors, the rest
    as JSON inside the same file.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{owner}/{name}": value.detach().cpu().contiguous()
        for owner, module in modules.items()
        for name, value in module.state_dict().items()
    }
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer/{index}/{name}": value.detach().cpu().contiguous() for name, value in moments.items()
        }
    temporary = folder / "state.safetensors.part"
    save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})
    temporary.replace(folder / "state.safetensors")


def load_state(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what `save_state` wrote into the modules and the optimiser, and return its ``progress``.

    Raises:
        TensorFileError: there is no state in the folder, it is damaged, or it belongs to other modules.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            progress: dict[str, Any] = json.loads(file.metadata()["progress"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TensorFileError(
            f"Training cannot resume: {path} is missing or damaged ({error}). Train without resuming."
        ) from error
    moments: dict[int, dict[str, Tensor]] = {}
    weights: dict[str, dict[str, Tensor]] = {owner: {} for owner in modules}
    for key, value in tensors.items():
        owner, _, name = key.partition("/")
        if owner == "optimizer":
            index, _, moment = name.partition("/")
            moments.setdefault(int(index), {})[moment] = value
        else:
            weights.setdefault(owner, {})[name] = value
    try:
        for owner, module in modules.items():
            module.load_state_dict(weights[owner])
    except RuntimeError as error:
        raise TensorFileError(
            f"Training cannot resume: {path} holds another model ({error}). Use its own settings."
        ) from error
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress
