"""What the value at every site of a block is made of: token by token and head by head, or of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from numpy.typing import NDArray

from vit_mechinterp.engine.binding.bound import BoundRun
from vit_mechinterp.model.layout import Layout
from vit_mechinterp.spec import BLOCK_SITES, Site

__all__ = ["BEHIND_CALL", "CUTS", "OF_ALL_TOKENS", "Anatomy", "Way", "sites_of"]

Marks = NDArray[Any]
"""What is said of a value, ``[example or 1, token or 1, head or 1]``; 1 where it is said of all of them."""
Reduce = Callable[[Marks, int], Marks]
"""What is said of all tokens (axis 1) or heads (axis 2) together; keeps the axis, as one of length 1."""

CUTS = ("embed", "resid_pre", "resid_mid", "resid_post")
"""Places in or before the blocks that all later ones follow from."""

BEHIND_CALL = BLOCK_SITES[BLOCK_SITES.index("attn.z") :]
"""Sites of a block at which its attention call has been made."""

OF_ALL_TOKENS = ("resid_pre", "ln1", "attn.k", "attn.v")
"""Sites of a block of which the attention call reads all tokens for each of its own."""


@cache
def sites_of(layer: int) -> tuple[Site, ...]:
    """The sites of a block, in forward order."""
    return tuple(Site(layer, name) for name in BLOCK_SITES)


@dataclass(frozen=True)
class Way:
    """How a value gets into what is made of it: whether into all tokens of it, and into all heads."""

    to_all_tokens: bool = False
    to_all_heads: bool = False


_APART, _MIXED = Way(), Way(to_all_heads=True)


@dataclass(frozen=True)
class Anatomy:
    """What the sites of one model's blocks have to do with each other.

    Args:
        layout: the model's.
        n_heads: number of heads at a site that has heads.
        follows_from: whether the output follows from a site behind the blocks alone.
        by_token: blocks whose tokens reach each other in the attention call alone, as far as anybody
            can tell.
        handed_on: blocks that are given the output of the one before, or of the embedding, as it is.
    """

    layout: Layout
    n_heads: Callable[[Site], int]
    follows_from: Callable[[Site], bool]
    by_token: Callable[[], frozenset[int]]
    handed_on: Callable[[], frozenset[int]]

    @cached_property
    def made_of(self) -> Mapping[str, Mapping[str, Way]]:
        """For every site of a block, the sites whose values its own is made of."""
        family = self.layout.family
        in_call = _MIXED if family.mixing else _APART
        trunk = {"resid_pre": _MIXED, "attn_out": _MIXED}
        return {
            "resid_pre": {},
            "ln1": {"resid_pre": _MIXED},
            **{projection: {"ln1": _MIXED} for projection in ("attn.q", "attn.k", "attn.v")},
            "attn.scores": {"attn.q": _APART, "attn.k": Way(to_all_tokens=True)},
            "attn.pattern": {"attn.scores": in_call},
            "attn.z": {"attn.pattern": in_call, "attn.v": Way(to_all_tokens=True)},
            "attn.result": {"attn.z": _APART},
            "attn_out": {"attn.result": _MIXED},
            "resid_mid": {} if family.parallel else trunk,
            "ln2": {"ln1" if family.parallel else "resid_mid": _MIXED},
            **{layer: {"ln2": _MIXED} for layer in ("mlp.pre", "mlp.pre_linear")},
            "mlp.post": {"mlp.pre": _MIXED, "mlp.pre_linear": _MIXED},
            "mlp_out": {"mlp.post": _MIXED},
            "resid_post": {**(trunk if family.parallel else {"resid_mid": _MIXED}), "mlp_out": _MIXED},
        }

    @cached_property
    def makes(self) -> Mapping[str, Mapping[str, Way]]:
        """For every site of a block, the sites that are made of its value."""
        return {
            site: {other: ways[site] for other, ways in self.made_of.items() if site in ways}
            for site in BLOCK_SITES
        }

    def passed(self, marks: Marks, layer: int, made: str, of: str, reduce: Reduce) -> Marks:
        """What is said of one of two sites, for what is said of the other: ``made`` is made ``of`` it."""
        if marks.shape[1:] == (1, 1):
            return marks
        way = self.made_of[made][of]
        if way.to_all_heads or self._other_heads(layer, made, of):
            marks = reduce(marks, 2)
        if way.to_all_tokens or not self._tokens_stay(layer, made, marks):
            marks = reduce(marks, 1)
        return marks

    def handed(self, marks: Marks, above: int, below: int, reduce: Reduce) -> Marks:
        """What is said of one of two streams, for what is said of the other: what block ``above`` is given
        (behind the last one, their output), and what block ``below`` puts out (-1, the embedding)."""
        is_next = above == below + 1
        if _are_alike(marks) or (is_next and above == self.layout.n_layers):
            return marks
        return marks if is_next and above in self.handed_on() else self.over_all_tokens(marks, reduce)

    def is_cut(self, site: Site, run: BoundRun) -> bool:
        """Whether all that is made of a run's rows behind a site follows from what is there."""
        if site.layer is None and site.name != "embed":
            return self.follows_from(site)
        return site.name in CUTS and not (site.name == "resid_mid" and site.layer in run.blocks.through)

    def over_all_tokens(self, marks: Marks, reduce: Reduce) -> Marks:
        """What is said of every token and head once all have been mixed."""
        return reduce(reduce(marks, 1), 2)

    def _other_heads(self, layer: int, made: str, of: str) -> bool:
        """Whether two sites with heads have other ones (keys and values may serve several queries)."""
        key = layer, made, of
        if key not in self._heads_differ:
            sites = [site for site in (Site(layer, made), Site(layer, of)) if site.has_heads]
            present = [site for site in sites if str(site) not in self.layout.absent]
            self._heads_differ[key] = len({self.n_heads(site) for site in present}) > 1
        return self._heads_differ[key]

    @cached_property
    def _heads_differ(self) -> dict[tuple[int, str, str], bool]:
        return {}

    def _tokens_stay(self, layer: int, made: str, marks: Marks) -> bool:
        """Whether tokens of one value reach the same tokens of another alone, as far as they differ."""
        if marks.shape[1] == 1:
            return True
        is_known = made != "attn.scores" or f"blocks.{layer}.attn.scores" not in self.layout.absent
        return (is_known and layer in self.by_token()) or _are_alike(marks)


def _are_alike(marks: Marks) -> bool:
    """Whether the same is said of all tokens."""
    return marks.shape[1] == 1 or bool((marks == marks[:, :1]).all())
