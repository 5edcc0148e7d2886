"""Where rows enter the growing batch, and what they enter with."""

from __future__ import annotations

from dataclasses import dataclass

from vit_mechinterp.spec import Site

__all__ = ["Beginning", "Blocks", "Join", "known_before", "output_before"]

_KNOWN_AT = {
    "attn_out": "attn_out",
    **dict.fromkeys(("resid_mid", "ln2", "mlp.pre_linear", "mlp.pre", "mlp.post"), "resid_mid"),
}
"""Where rows are given clean values behind the whole attention module, by the site of their first edit.
Behind its call alone they would have to be kept beside the block's input, which costs what it spares."""


@dataclass(frozen=True, order=True)
class Join:
    """Where a row enters the growing batch: at a block's input, or behind its output."""

    layer: int
    behind: bool

    @property
    def site(self) -> Site:
        """The site whose clean value a joining row starts from."""
        if self.behind:
            return Site(self.layer, "resid_post")
        return Site(None, "embed") if self.layer == 0 else Site(self.layer, "resid_pre")

    @property
    def first_block(self) -> int:
        """The first block that the row passes through."""
        return self.layer + self.behind


@dataclass(frozen=True)
class Beginning:
    """Where a row goes on from what another one has been through: behind block ``layer``.

    ``made`` edits have been made by then. With ``halves``, it begins with the middle of that block and the
    increment of its MLP, which somebody is about to edit, and not with their sum.
    """

    layer: int
    made: int
    halves: bool

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites whose values the row begins with, before edits that are still to be made there."""
        if self.halves:
            return Site(self.layer, "resid_mid"), Site(self.layer, "mlp_out")
        return (Site(self.layer, "resid_post"),)


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model as rows pass them.

    ``n`` is how many there are, ``through`` the layers of those that rows must pass as a whole, because
    somebody else acts on what they return, and ``closed`` of those behind which no row can join.
    """

    n: int
    through: frozenset[int] = frozenset()
    closed: frozenset[int] = frozenset()

    def last_open(self, block: int) -> int:
        """The last block up to some block at whose input a row can join."""
        while block and block - 1 in self.closed:
            block -= 1
        return block

    def is_increment(self, site: Site) -> bool:
        """Whether a block's output is what is edited at a site and the middle of the block."""
        return site.name == "mlp_out" and site.layer not in self.through

    def join(self, site: Site) -> Join:
        """Where a row may enter that is edited at a site, and not before."""
        if site.layer is None:
            before = 0 if site.name == "embed" else self.last_open(self.n)
            return Join(before - 1, True) if before else Join(0, False)
        return Join(site.layer, site.name == "resid_post" or self.is_increment(site))


def known_before(site: Site) -> Site | None:
    """The last site before some site of a block at which rows can be given clean values, so that no part of
    the block before it is computed for them; None where that is none."""
    name = _KNOWN_AT.get(site.name)
    return None if name is None else Site(site.layer, name)


def output_before(site: Site) -> Site:
    """Where what a block is given comes out of the block before, or of the embedding."""
    return Site(site.layer - 1, "resid_post") if site.layer else Site(None, "embed")
