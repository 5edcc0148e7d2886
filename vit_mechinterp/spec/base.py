"""What all spec models share: frozen, strict about field names, with a digest."""

from __future__ import annotations

import operator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.spec.digest import digest

__all__ = ["Index", "SpecModel", "as_index"]


class SpecModel(BaseModel):
    """A frozen pydantic model that refuses unknown fields by name and has a digest."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON, defaults included: equal specs have equal digests."""
        return digest(self.model_dump(mode="json"))

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        # pydantic's own message for an unknown key names neither the close matches nor the fields there are.
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        unknown = [key for key in data if key not in fields]
        if unknown:
            details = [
                InitErrorDetails(
                    type=PydanticCustomError(
                        "unknown_field",
                        "Unknown field {key}.{close} Fields of {model}: {fields}.",
                        {
                            "key": repr(key),
                            "close": suggest(str(key), fields),
                            "model": cls.__name__,
                            "fields": ", ".join(fields),
                        },
                    ),
                    loc=(str(key),),
                    input=data[key],
                )
                for key in unknown
            ]
            raise ValidationError.from_exception_data(cls.__name__, details)
        return data


def as_index(value: Any) -> int:
    """Return a non-negative Python int from anything that is an integer (numpy's included), refusing
    booleans."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise SpecError(f"{value!r} is not an integer; a non-negative integer is wanted here.")
    index = operator.index(value)
    if index < 0:
        raise SpecError(
            f"{index} is negative; indices count from 0, and negative ones are not wrapped around."
        )
    return index


Index = Annotated[int, BeforeValidator(as_index)]
"""A non-negative integer: a layer, a head, a seed."""
