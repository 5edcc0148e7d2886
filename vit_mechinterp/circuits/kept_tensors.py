"""Tensors that need not be computed twice, in a folder: each group is found by a digest of what decides it.

One folder serves many calls, since what one call keeps no other finds. A file takes its name when it is
complete, and its tensors are read when they are wanted; one that is torn is reported, and left as it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_mechinterp.engine.files.tensorfiles import replacing, sweep
from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.spec.digest import digest

__all__ = ["KeptTensors"]

logger = logging.getLogger(__name__)


class KeptTensors:
    """Groups of tensors by key (a digest), in the safetensors files of a folder.

    Args:
        folder: where; made if need be.

    Raises:
        ExecutionError: nothing can be written there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._files: dict[str, Path] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
        except OSError as error:
            raise ExecutionError(f"What is finished cannot be kept in {folder}: {error}.") from None
        for path in sorted(self.folder.glob("*.safetensors")):
            self._list(path)

    def _list(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                self._files |= {name.partition(".")[0]: path for name in list(file.keys())}
        except (OSError, SafetensorError) as error:
            logger.warning("%s holds nothing that is finished, and is left as it is: %s", path, error)

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def load(self, key: str) -> dict[str, Tensor]:
        """The tensors of a group by name, in the order in which they were saved."""
        from safetensors import safe_open

        with safe_open(self._files[key], framework="pt") as file:
            own = [name.split(".", 2) for name in list(file.keys()) if name.partition(".")[0] == key]
            own.sort(key=lambda parts: int(parts[1]))
            return {parts[2]: file.get_tensor(".".join(parts)) for parts in own}

    def record(self, key: str) -> dict[str, Any]:
        """What was said of a group when it was saved."""
        from safetensors import safe_open

        with safe_open(self._files[key], framework="pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {}).get("record", "{}"))
        return found

    def save(
        self, groups: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any] | None = None
    ) -> None:
        """Write groups into one file, with what is to be said of them.

        Raises:
            ExecutionError: it cannot be written.
        """
        from safetensors.torch import save

        path = self.folder / f"{digest(sorted(groups))[:32]}.safetensors"
        # Cloned, because tensors of one file may share no memory.
        held = {
            f"{key}.{place}.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, own in groups.items()
            for place, (name, tensor) in enumerate(own.items())
        }
        try:
            with replacing(path) as file:
                file.write(save(held, {"record": json.dumps(record or {})}))
        except OSError as error:
            raise ExecutionError(
                f"What is finished cannot be written into {self.folder}: {error}. Choose another folder, or "
                "make room; what is there already stays."
            ) from error
        self._files |= dict.fromkeys(groups, path)
