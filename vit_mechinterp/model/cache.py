"""What a run keeps, and what is known of a site before one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.model.layout import TAP_SITES
from vit_mechinterp.spec import Site

__all__ = ["ActivationCache", "BySite", "SiteInfo", "describe"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class SiteInfo:
    """What a site holds.

    ``shape`` is the shape for one example (without the batch axis), ``axes`` names its axes, ``note`` says
    what the library's user should know about this site on this model.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    readable: bool = True
    writable: bool = True
    note: str = ""


class BySite(Mapping[str, Value]):
    """Values by site name, as captured; TransformerLens spellings find them as well."""

    owner = ""
    """Who captured, for messages; begins a sentence."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Value:
        if name in self._values:
            return self._values[name]
        try:
            canonical = str(Site.parse(name))
        except SpecError as error:
            raise KeyError(f"{self.owner}{error}") from None
        if canonical in self._values:
            return self._values[canonical]
        captured = ", ".join(self._values) or "nothing"
        close = suggest(name, self._values)
        raise KeyError(f"{self.owner}{name} was not captured.{close} Captured: {captured}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        width = max(map(len, self._values), default=0)
        lines = [f"\n  {name:<{width}}  {_shape(value)}" for name, value in self._values.items()]
        sites = f"{len(lines)} site{'s' * (len(lines) != 1)}{':' * bool(lines)}"
        return f"{type(self).__name__} of {sites}{''.join(lines)}"


class ActivationCache(BySite[Tensor]):
    """Activations by site name, as captured; TransformerLens spellings find them as well."""


def _shape(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{len(value)} tensors"  # type: ignore[arg-type]
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def describe(site: Site, shape: tuple[int, ...]) -> SiteInfo:
    """What the library's user should know about a site whose shape for one example is known."""
    note = ""
    if site.name in ("attn.scores", "attn.pattern"):
        note = "explicit attention in this block while read or written"
    elif site.name in TAP_SITES:
        note = "read at the fused attention call"
    elif site.name == "attn.result":
        note = (
            "derived from z and the output projection; a write moves attn_out by the change, summed "
            "over heads"
        )
    elif site.name == "resid_mid":
        note = "a write moves the skip connection and the MLP"
    return SiteInfo(shape, site.axes[1:], note=note)
