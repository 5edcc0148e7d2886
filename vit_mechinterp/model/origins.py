"""Model strings that name folders: ``hf/./my-vit``, ``timm/~/my-vit``."""

from __future__ import annotations

from pathlib import Path

from vit_mechinterp.errors import SpecError

__all__ = ["absolute", "is_folder"]


def is_folder(name: str) -> bool:
    """Whether what follows the library in a model string is a folder."""
    return name.startswith((".", "/", "~"))


def absolute(source: str) -> str:
    """Return a model string that means the same from any working folder.

    Raises:
        SpecError: the home folder of ``~user`` is unknown.
    """
    library, _, name = source.partition("/")
    if not is_folder(name):
        return source
    try:
        return f"{library}/{Path(name).expanduser().resolve()}"
    except RuntimeError as error:
        raise SpecError(f"{source!r} names no folder: {error}") from None
