"""Model strings that name folders: ``hf/./my-vit``, ``timm/~/my-vit``, or ``./my-vit`` for either."""

from __future__ import annotations

import json
from pathlib import Path

from vit_mechinterp.errors import SpecError

__all__ = ["absolute", "is_folder", "library_of"]


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


def library_of(source: str) -> str:
    """Put the library before a folder that stands alone, by what its ``config.json`` holds.

    Raises:
        SpecError: the folder has no readable ``config.json`` of either library.
    """
    if not is_folder(source):
        return source
    folder = Path(absolute(f"hf/{source}").removeprefix("hf/"))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(
            f"{source!r} is no folder with a model: its config.json cannot be read ({reason}). A file with "
            "weights alone is read by 'timm/NAME' with checkpoint_path=FILE."
        ) from None
    keys = config if isinstance(config, dict) else {}
    if "architecture" in keys:
        return f"timm/{source}"
    if "model_type" in keys or "architectures" in keys:
        return f"hf/{source}"
    raise SpecError(
        f"The config.json of {source!r} has neither timm's 'architecture' nor transformers' 'model_type'; "
        f"say which library it is of: 'timm/{source}' or 'hf/{source}'."
    )
