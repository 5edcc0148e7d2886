"""Reading and writing specs as YAML and JSON text, with errors that name the file and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec.problems import as_spec_error

__all__ = ["dump_yaml", "load_json", "load_yaml", "read_text", "validate"]

_Model = TypeVar("_Model", bound=BaseModel)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, where YAML libraries silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float)) and key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is written twice", problem_mark=key_node.start_mark
                )
            if isinstance(key, (str, int, float)):
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_text(path: Path) -> str:
    """Return the text of a file; SpecError if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"Cannot read the document {str(path)!r}: {reason}.") from None


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML safely (plain data only); SpecError with file, line and column if it is malformed."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"{where}{place}: not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{where}: not valid YAML: {error}.") from None


def load_json(text: str, where: str) -> Any:
    """Parse JSON; SpecError with file, line and column if it is malformed."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(
            f"{where}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}."
        ) from None


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML: keys in the given order, short lists and mappings on one line."""
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)


def validate(model: type[_Model], data: Any, where: str) -> _Model:
    """Validate a parsed document; SpecError that gives one line ``where: path.of.key: what`` per problem."""
    if not isinstance(data, dict):
        raise SpecError(
            f"{where}: {model.__name__} is a mapping of {', '.join(model.model_fields)}; got {data!r}."
        )
    try:
        # Past model_validate, which names the class where this names the document.
        validated: _Model = model.__pydantic_validator__.validate_python(data)
        return validated
    except ValidationError as error:
        raise as_spec_error(error, where, model.model_fields) from None
