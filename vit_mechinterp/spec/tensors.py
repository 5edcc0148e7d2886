"""References to tensors: a spec names arrays, it never holds them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, overload

from pydantic import field_validator, model_validator

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec.base import SpecModel

__all__ = ["TensorRef"]


class TensorRef(SpecModel):
    """A tensor by name, or by safetensors file and key (and, if given, the SHA-256 of the file).

    ``TensorRef("probe")`` is looked up in ``tensors={"probe": tensor}``; ``TensorRef("das.safetensors",
    "rotation")`` is read from the file. In a document a plain string is a name. Raises SpecError unless it is
    exactly one of the two.
    """

    name: str | None = None
    file: str | None = None
    key: str | None = None
    sha256: str | None = None

    @overload
    def __init__(self, name: str, /) -> None: ...
    @overload
    def __init__(self, file: str | os.PathLike[str], /, key: str, sha256: str | None = None) -> None: ...
    @overload
    def __init__(
        self,
        *,
        name: str | None = None,
        file: str | os.PathLike[str] | None = None,
        key: str | None = None,
        sha256: str | None = None,
    ) -> None: ...
    def __init__(self, *parts: Any, **fields: Any) -> None:
        if len(parts) > 3:
            raise SpecError(f"TensorRef takes a name, or a file, key and sha256; got {len(parts)} values.")
        first = "file" if len(parts) > 1 or "key" in fields else "name"
        for field, part in zip((first, "key", "sha256"), parts, strict=False):
            if field in fields:
                raise SpecError(f"TensorRef got {field!r} twice: {part!r} and {fields[field]!r}.")
            fields[field] = part
        super().__init__(**fields)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # see SpecModel

    @model_validator(mode="before")
    @classmethod
    def _a_string_is_a_name(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"name": data}
        given = data.get("name") if isinstance(data, Mapping) else data
        if hasattr(given, "shape") or isinstance(given, (list, tuple)):
            kind = type(given).__name__
            raise SpecError(
                f"A spec holds no tensors, got a {kind}: give a name here, and the tensor to execute or "
                "run_experiment as tensors={name: tensor}."
            )
        return data

    @field_validator("file", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("sha256")
    @classmethod
    def _hexadecimal(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise SpecError(f"sha256 is 64 hexadecimal digits, got {value!r}.")
        return value.lower() if value is not None else None

    @model_validator(mode="after")
    def _one_of_the_two(self) -> TensorRef:
        if self.name is not None:
            if self.file is not None or self.key is not None or self.sha256 is not None:
                raise SpecError(
                    f"A TensorRef is a name or a file, not both: name={self.name!r}, file={self.file!r}, "
                    f"key={self.key!r}."
                )
            if not self.name:
                raise SpecError("The name of a tensor cannot be empty.")
            if self.name.endswith(".safetensors"):
                raise SpecError(
                    f"{self.name!r} looks like a file, and a file needs the key of the tensor in it: "
                    f"TensorRef({self.name!r}, key)."
                )
        elif not self.file or not self.key:
            raise SpecError(
                "A TensorRef is either a name (given to execute as tensors={name: tensor}) or a "
                f"safetensors file with the key of a tensor in it; got file={self.file!r}, key={self.key!r}."
            )
        return self

    def __str__(self) -> str:
        return self.name if self.name is not None else f"{self.file}:{self.key}"
