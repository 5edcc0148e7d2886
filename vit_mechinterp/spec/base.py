"""What all spec models share: frozen, strict about field names, with a digest."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.spec.digest import digest
from vit_mechinterp.spec.problems import as_spec_error

__all__ = ["Index", "SpecModel", "TaggedSpec", "as_index", "nested"]


class SpecModel(BaseModel):
    """A frozen pydantic model that refuses unknown fields by name and has a digest.

    Making one, in Python or with ``model_validate``, raises SpecError with one line per problem.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    if not TYPE_CHECKING:  # type checkers see the fields

        def __init__(self, /, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise as_spec_error(error, type(self).__name__, type(self).model_fields) from None

        # What stands inside another model is validated past __init__, so that errors keep their path.
        __init__.__pydantic_base_init__ = True

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Make one from a mapping; SpecError if it is none."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise as_spec_error(error, cls.__name__, cls.model_fields) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Make one from JSON text; SpecError if it is none."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise as_spec_error(error, cls.__name__, cls.model_fields) from None

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


class TaggedSpec(SpecModel):
    """A spec that documents tell from others of its kind by its ``op``."""

    op: str

    @model_serializer(mode="wrap")
    def _always_say_op(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # op is a default of its class, but a document without it could not be read back.
        return {"op": self.op, **handler(self)}


_Model = TypeVar("_Model", bound=SpecModel)


def nested(model: type[_Model], value: Any) -> _Model:
    """Validate inside a validator: pydantic's own error passes, and is collected with the path of its key."""
    validated: _Model = model.__pydantic_validator__.validate_python(value)
    return validated


def by_op(value: Any, known: Mapping[str, type[_Model]], what: str) -> _Model:
    """Validate a mapping as the model that its ``op`` names; SpecError, for a ``what``, if there is none."""
    names = ", ".join(sorted(known))
    if not isinstance(value, Mapping):
        article = "An" if what[0] in "aeiou" else "A"
        raise SpecError(f"{article} {what} is a mapping with an 'op' ({names}), got {reprlib.repr(value)}.")
    op = value.get("op")
    if op is None:
        raise SpecError(f"This {what} does not say its 'op'. Known: {names}.")
    if not isinstance(op, str) or op not in known:
        raise SpecError(f"Unknown op {op!r}.{suggest(str(op), known)} Known: {names}.")
    return nested(known[op], dict(value))


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
