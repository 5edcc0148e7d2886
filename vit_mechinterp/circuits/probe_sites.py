"""Where the tokens of a pair are probed, and where a probe's direction is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import AddDirection, Capture, Site, TensorRef

__all__ = ["PairSites", "pair_sites"]


@dataclass(frozen=True)
class PairSites:
    """The same two sites in several layers.

    Attributes:
        layers: the blocks.
        probed: layer to the site that is probed.
        changed: layer to the site that the direction is added at.
        n_heads: heads of that site, each with a part of the direction; None where it has no axis of heads.
    """

    layers: tuple[int, ...]
    probed: Mapping[int, str]
    changed: Mapping[int, str]
    n_heads: int | None

    @property
    def intervene_at(self) -> str:
        """The changed site without its layer."""
        return Site.parse(self.changed[self.layers[0]]).name

    @property
    def apart(self) -> bool:
        """Whether the direction is added elsewhere than it was read."""
        return dict(self.probed) != dict(self.changed)

    def captures(self, tokens: Any) -> tuple[Capture, ...]:
        """What a run keeps for the probes."""
        return tuple(Capture(site=self.probed[layer], tokens=tokens) for layer in self.layers)

    def add(self, layer: int, tokens: Any, choose: str, alpha: float) -> tuple[AddDirection, ...]:
        """The intervention: add the row of a probe that the column ``choose`` picks."""
        return tuple(
            AddDirection(
                site=self.changed[layer],
                tokens=tokens,
                heads=None if head is None else [head],
                vector=TensorRef(name=self._vector(layer, head)),
                alpha=alpha,
                choose={"column": choose},
            )
            for head in self._heads()
        )

    def vectors(
        self, layer: int, weight: Float[Tensor, "class feature"], n_tokens: int
    ) -> dict[str, Float[Tensor, "class token d"]]:
        """The tensors that `add` names: a probe's rows, token by token, and head by head where there are
        heads."""
        rows = weight.reshape(len(weight), n_tokens, -1)
        if self.n_heads is None:
            return {self._vector(layer, None): rows}
        by_head = rows.reshape(*rows.shape[:2], self.n_heads, -1)
        return {self._vector(layer, head): by_head[:, :, head].contiguous() for head in range(self.n_heads)}

    def _heads(self) -> Sequence[int | None]:
        return [None] if self.n_heads is None else list(range(self.n_heads))

    @staticmethod
    def _vector(layer: int, head: int | None) -> str:
        return f"probe of layer {layer}" + ("" if head is None else f", head {head}")


def pair_sites(
    vit: HookedViT, site: str, intervene_at: str | None, layers: Sequence[int] | None
) -> PairSites:
    """Return the sites by layer, checked against the model.

    Raises:
        SpecError: a site is none, has no tokens or cannot be written, the two sites differ in their width, or
            the model has no such layer.
    """
    n_layers = vit.layout.n_layers
    chosen = tuple(range(n_layers)) if layers is None else tuple(layers)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0 or max(chosen) >= n_layers:
        raise SpecError(
            f"layers={list(chosen)}: name at least one block, each once, of the model's 0 to {n_layers - 1}."
        )
    probed, changed = ({n: _in_block(vit, name, n) for n in chosen} for name in (site, intervene_at or site))
    known = vit.sites()
    for layer in chosen:
        there, here = known[changed[layer]], known[probed[layer]]
        if not there.writable:
            raise SpecError(f"{changed[layer]} cannot be written{f': {there.note}' if there.note else ''}.")
        if here.shape[1:] != there.shape[1:]:
            raise SpecError(
                f"A probe at {probed[layer]} has no direction for {changed[layer]}: a token there has the "
                f"shape {list(there.shape[1:])}, not {list(here.shape[1:])}. Intervene where you probe, or "
                "at a site of the same width."
            )
    with_heads = "head" in known[changed[chosen[0]]].axes
    return PairSites(chosen, probed, changed, known[changed[chosen[0]]].shape[1] if with_heads else None)


def _in_block(vit: HookedViT, name: str, layer: int) -> str:
    parsed = Site.parse(f"blocks.{layer}.{name}")
    if parsed.is_attention_matrix:
        raise SpecError(f"{parsed} is a matrix of tokens by tokens, so a token has no vector to probe there.")
    return vit.expand([str(parsed)])[0]
