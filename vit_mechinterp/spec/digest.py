"""One canonical JSON text per value, and its SHA-256: the identity of a spec."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vit_mechinterp.errors import SpecError

__all__ = ["canonical_json", "digest"]


def canonical_json(value: Any) -> str:
    """Return the JSON text of ``value`` with sorted keys, no spaces and one spelling per number.

    Integral floats are written as integers (``1.0`` and ``1`` are one number in JSON, as in RFC 8785), so
    values that compare equal have equal texts. Raises SpecError for values that JSON cannot hold (nan, inf,
    objects).
    """
    try:
        return json.dumps(
            _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"This value has no canonical JSON form: {error}. A spec holds strings, finite numbers, "
            "booleans, null, lists and mappings only; put arrays in a safetensors file "
            "and refer to them with a TensorRef."
        ) from None


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of ``value`` as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, bool):  # most of a document
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value
