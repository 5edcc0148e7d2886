"""Weights in pickles are refused unless they are asked for: reading a pickle can run the code inside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vit_mechinterp.errors import SpecError

__all__ = ["SAFE", "SAVE_FILE", "is_pickle", "pickles_in", "refused"]

SAFE = (".safetensors", ".npz")
"""Endings of weights that are read; numpy's archives are read without the objects that they may hold."""

SAVE_FILE = ("safetensors.torch.save_model(vit.module, FILE)", "load it with checkpoint_path=FILE")
"""How to save a module of a library without a format for folders, and how to load it again."""

_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".tar")


def is_pickle(file: str | Path) -> bool:
    """Whether a file of weights is in another format than those that hold nothing but numbers."""
    return not str(file).lower().endswith(SAFE)


def pickles_in(folder: Path) -> list[str]:
    """Names of the files in a folder that look like pickled weights."""
    return sorted(file.name for file in folder.glob("*") if file.suffix.lower() in _PICKLES)


def refused(
    source: str, files: Iterable[str], save: str, again: str = "load that folder"
) -> SpecError:
    """The error for weights that exist in pickles alone.

    Args:
        source: what was to be loaded.
        files: the pickles that were found.
        save: how to save the loaded model with safetensors.
        again: how to load what was saved.
    """
    return SpecError(
        f"{source} has its weights in {', '.join(files)} and not in safetensors. That format is a pickle, "
        "which can run code when it is read, so it is not read unless you ask for it. If you trust where it "
        f"comes from, load it once with allow_pickle=True, keep it with {save}, and {again} from then on."
    )
