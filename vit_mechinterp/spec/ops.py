"""The base of all interventions, and the registry that tells them apart by ``op``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self, TypeAlias, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    SerializeAsAny,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec.base import SpecModel, TaggedSpec, as_index, by_op, nested
from vit_mechinterp.spec.sites import Site
from vit_mechinterp.spec.tokens import Tokens

__all__ = [
    "OPS",
    "AnyIntervention",
    "Heads",
    "Intervention",
    "Interventions",
    "RunSource",
    "SiteName",
    "Source",
    "SourcedIntervention",
    "check_selectors",
    "register_op",
]


def _site_name(value: Any) -> str:
    return str(Site.parse(value))


def _heads(value: Any) -> tuple[int, ...]:
    heads = tuple(as_index(head) for head in (value if isinstance(value, (Sequence, range)) else [value]))
    if not heads:
        raise SpecError("An empty list selects no head; leave heads out to mean all of them.")
    if len(set(heads)) != len(heads):
        raise SpecError(f"heads names a head twice: {list(heads)}.")
    return heads


SiteName: TypeAlias = Annotated[str, BeforeValidator(_site_name, json_schema_input_type=str)]
"""A canonical site name; TransformerLens spellings of the same meaning are translated."""

Heads: TypeAlias = Annotated[tuple[int, ...], BeforeValidator(_heads, json_schema_input_type=int | list[int])]
"""One head or a list of them; distinct, counted from 0."""


class RunSource(SpecModel):
    """Another run as the source: its value at the source site after its own edits, for the same example."""

    run: str = Field(min_length=1)


def _source(value: Any) -> str | RunSource:
    if isinstance(value, RunSource) or (isinstance(value, str) and value):
        return value
    if isinstance(value, Mapping) and set(value) == {"run"}:
        return nested(RunSource, dict(value))
    raise SpecError(
        f"{value!r} is no source. Write the name of an image column, or {{'run': name}} for another run."
    )


Source: TypeAlias = Annotated[
    str | RunSource, BeforeValidator(_source, json_schema_input_type=str | RunSource)
]


class Intervention(TaggedSpec):
    """What all interventions have: an ``op``, one ``site``, and which tokens, heads and keys of it are meant.

    ``heads`` selects along the head axis and exists at head sites only. At attention matrices ``tokens``
    selects queries and ``keys`` selects keys. ``pooled`` and ``logits`` have no token axis, so only
    ``tokens="all"`` fits.
    """

    site: SiteName
    tokens: Tokens = "all"
    heads: Heads | None = None
    keys: Tokens = "all"

    @model_validator(mode="after")
    def _selectors_fit_site(self) -> Self:
        site = Site.parse(self.site)
        if self.keys != "all" and not site.is_attention_matrix:
            raise SpecError(
                f"keys={self.keys!r} has no meaning at {self.site!r}: only attn.scores and attn.pattern "
                "have keys."
            )
        check_selectors(self.site, self.tokens, self.heads)
        return self

    def at(self, layer: int | None = None, **changes: Any) -> Self:
        """Return a validated copy with ``changes`` made and, if ``layer`` is given, ``site`` moved to that
        block.

        A ``source_site`` that was left out follows ``site``; one that was given stays. Raises SpecError if
        ``site`` stands in no block, or if the changed intervention is not valid.
        """
        fields = {**{field: getattr(self, field) for field in type(self).model_fields}, **changes}
        if layer is not None:
            fields["site"] = str(Site.parse(fields["site"]).at(layer))
        return type(self).model_validate(fields)


def check_selectors(site_name: str, tokens: object, heads: object) -> None:
    """Raise SpecError if the site has no token axis or no head axis, and one is selected from."""
    site = Site.parse(site_name)
    if tokens != "all" and not site.has_tokens:
        raise SpecError(f"{site_name!r} has no token axis, so only tokens='all' fits there; got {tokens!r}.")
    if heads is not None and not site.has_heads:
        raise SpecError(
            f"{site_name!r} has no head axis, so heads={heads!r} cannot be selected there. Sites with "
            "heads: attn.q, attn.k, attn.v, attn.z, attn.scores, attn.pattern, attn.result."
        )


class SourcedIntervention(Intervention):
    """An intervention that reads an activation from elsewhere."""

    source: Source | None = None
    source_tokens: Tokens | None = None
    source_site: SiteName | None = None

    @property
    def tokens_read(self) -> Any:
        """The selector on the source side: ``source_tokens``, or ``tokens`` if that was left out."""
        return self.tokens if self.source_tokens is None else self.source_tokens

    @property
    def site_read(self) -> str:
        """The site on the source side: ``source_site``, or ``site`` if that was left out."""
        return self.site if self.source_site is None else self.source_site

    @model_validator(mode="after")
    def _source_fits_site(self) -> Self:
        if self.source is None:
            return self
        here, there = Site.parse(self.site), Site.parse(self.site_read)
        if here.axes[:-1] != there.axes[:-1]:
            raise SpecError(
                f"The source site {str(there)!r} [{', '.join(there.axes)}] cannot be paired with "
                f"{self.site!r} [{', '.join(here.axes)}]: their axes differ."
            )
        check_selectors(self.site_read, self.tokens_read, None)
        return self


OPS: dict[str, type[Intervention]] = {}
"""Every registered intervention by its ``op``."""

_Op = TypeVar("_Op", bound=Intervention)


def register_op(cls: type[_Op]) -> type[_Op]:
    """Class decorator: let documents use ``cls`` under the default value of its ``op`` field.

    Raises SpecError if ``op`` has no string default or is taken by another class.
    """
    op = cls.model_fields["op"].default
    if not isinstance(op, str):
        raise SpecError(f'{cls.__name__} needs a field such as op: Literal["my_op"] = "my_op".')
    known = OPS.get(op)
    # The same class defined again (a notebook cell run twice) replaces the older one.
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise SpecError(
            f"The op {op!r} is already {known.__module__}.{known.__qualname__}; choose another name."
        )
    OPS[op] = cls
    return cls


def _intervention(value: Any) -> Intervention:
    if isinstance(value, Intervention):
        if OPS.get(value.op) is not type(value):
            raise SpecError(
                f"{type(value).__name__} (op {value.op!r}) is not registered: decorate it with @register_op."
            )
        return value
    return by_op(value, OPS, "intervention")


class _RegisteredOps:
    """Describes the field as any of the ops registered at the time the schema is made."""

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schemas = {op: handler(cls.__pydantic_core_schema__) for op, cls in OPS.items()}
        mapping = {op: schema["$ref"] for op, schema in schemas.items() if "$ref" in schema}
        return {"anyOf": list(schemas.values()), "discriminator": {"propertyName": "op", "mapping": mapping}}


AnyIntervention: TypeAlias = Annotated[
    SerializeAsAny[Intervention], BeforeValidator(_intervention, json_schema_input_type=Any), _RegisteredOps()
]
"""Any registered intervention; in a document, a mapping with its ``op``."""


def _one_is_several(value: Any) -> Any:
    return [value] if isinstance(value, (Intervention, Mapping)) else value


Interventions: TypeAlias = Annotated[tuple[AnyIntervention, ...], BeforeValidator(_one_is_several)]
"""A list of interventions; a single one stands for a list of it."""
