"""What a run keeps, and what is known of a site before one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.model.layout import TAP_SITES
from vit_mechinterp.spec import Site

__all__ = ["ActivationCache", "SiteInfo", "describe"]


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


class ActivationCache(Mapping[str, Tensor]):
    """Activations by site name, as captured; TransformerLens spellings find them as well."""

    def __init__(self, activations: Mapping[str, Tensor]) -> None:
        self._activations = dict(activations)

    def __getitem__(self, name: str) -> Tensor:
        found = self._activations.get(name)
        if found is None:
            try:
                found = self._activations.get(str(Site.parse(name)))
            except SpecError as error:
                raise KeyError(str(error)) from None
        if found is None:
            captured = ", ".join(self._activations) or "nothing"
            raise KeyError(
                f"{name} was not captured.{suggest(name, self._activations)} Captured: {captured}."
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(x.shape)}" for name, x in self._activations.items())
        return f"ActivationCache({shapes})"


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
