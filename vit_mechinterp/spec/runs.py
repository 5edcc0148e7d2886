"""Runs: one forward of a base image each, with interventions, and with captures of what to keep."""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeAlias

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from vit_mechinterp.spec.base import SpecModel
from vit_mechinterp.spec.ops import Heads, Interventions, check_selectors
from vit_mechinterp.spec.sites import Site, is_glob
from vit_mechinterp.spec.tokens import Tokens

__all__ = ["Capture", "Captures", "Run"]


def _site_or_glob(value: Any) -> Any:
    return value if isinstance(value, str) and is_glob(value) else str(Site.parse(value))


class Capture(SpecModel):
    """A value to keep: a site (or a pattern over sites), and which of its tokens and heads.

    The value is the one after the edits at that site. At attention matrices ``tokens`` selects queries.
    """

    site: Annotated[str, BeforeValidator(_site_or_glob, json_schema_input_type=str)]
    tokens: Tokens = "all"
    heads: Heads | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_string_is_a_site(cls, data: Any) -> Any:
        return {"site": data} if isinstance(data, (str, Site)) else data

    @model_validator(mode="after")
    def _selectors_fit_site(self) -> Self:
        if not is_glob(self.site):
            check_selectors(self.site, self.tokens, self.heads)
        return self


def _captures(value: Any) -> Any:
    return [value] if isinstance(value, (str, Site, Capture)) else value


Captures: TypeAlias = Annotated[
    tuple[Capture, ...],
    BeforeValidator(_captures, json_schema_input_type=str | list[str | Capture]),
]
"""A list of captures; a plain string stands for ``Capture(site)``."""


class Run(SpecModel):
    """One counterfactual world: the image column ``base``, the interventions made on it, and what to capture.

    Interventions at different sites act in forward order; the order of the list counts at one and the same
    site only. A run without interventions is the clean one.

    ``output`` says whether its output is wanted. A run without is there for its captures, or for runs that
    read it: it goes no further than they do, and has no row among the outputs.
    """

    name: str = Field(min_length=1)
    interventions: Interventions = ()
    base: str = Field(default="base", min_length=1)
    capture: Captures = ()
    output: StrictBool = True
