"""One block, run once on many rows that are written to at one site each.

All rows start from one image's clean residual stream, so a write is compared with the clean row beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vit_mechinterp.model.conformance.subject import Subject, wide
from vit_mechinterp.model.instrument import Visitor
from vit_mechinterp.model.layout import lookup
from vit_mechinterp.model.positional import PositionalProjection
from vit_mechinterp.spec import BLOCK_SITES

__all__ = ["AMPLITUDES", "Edited", "Write", "edited_block", "noisy"]

FEEDS = {
    "resid_pre": ("ln1", "resid_mid"),
    "ln1": ("attn.q", "attn.k", "attn.v"),
    "attn.q": ("attn.scores",),
    "attn.k": ("attn.scores",),
    "attn.v": ("attn.z",),
    "attn.scores": ("attn.pattern",),
    "attn.pattern": ("attn.z",),
    "attn.z": ("attn.result", "attn_out"),
    "attn.result": ("attn_out",),
    "attn_out": ("resid_mid",),
    "resid_mid": ("ln2", "resid_post"),
    "ln2": ("mlp.pre", "mlp.pre_linear"),
    "mlp.pre": ("mlp.post",),
    "mlp.pre_linear": ("mlp.post",),
    "mlp.post": ("mlp_out",),
    "mlp_out": ("resid_post",),
    "resid_post": (),
}
"""What is computed from what in a block whose MLP follows its attention."""
PARALLEL = FEEDS | {
    "resid_pre": ("ln1", "ln2", "resid_post"),
    # Where there is no second norm, the one there is serves both branches.
    "ln1": (*FEEDS["ln1"], "mlp.pre", "mlp.pre_linear"),
    "attn_out": ("resid_post",),
}
"""The same where attention and MLP read one input, and there is no resid_mid."""
POSITIONAL = {"ln1": ("attn.v",)}
"""What differs where queries and keys are made positional: tokens reach the values alone."""

AMPLITUDES = (1.0, 1000.0)
"""Of what is written, in standard deviations; the second only where the first is lost in rounding."""


@dataclass(frozen=True)
class Edited:
    """One block's values, by site without its layer.

    The first and the last row are clean; row ``rows[site]`` is written to at that site.
    """

    layer: int
    values: dict[str, Tensor]
    rows: dict[str, int]
    feeds: dict[str, tuple[str, ...]]

    def name(self, site: str) -> str:
        """The full name of one of the block's sites."""
        return f"blocks.{self.layer}.{site}"

    def has(self, *sites: str) -> bool:
        """Whether all of these sites can be read."""
        return all(site in self.values for site in sites)

    def defined(self, site: str) -> list[int]:
        """Rows in which a site holds what the sites before it define: all but its own."""
        return [row for row in range(len(self.rows) + 2) if row != self.rows[site]]

    @cached_property
    def distances(self) -> dict[str, list[float]]:
        """How far every row is from the clean one, by site, as a share of the site's clean scale."""
        return {site: _distances(wide(value)) for site, value in self.values.items()}

    def distance(self, row: int, site: str) -> float:
        """How far a row is from the clean one at a site."""
        return self.distances[site][row]

    def deviation(self, site: str, wanted: Tensor, scale: Tensor) -> float:
        """How far a site is, where it is not written to, from what defines it; by each row's scale."""
        found = self.values[site]
        shares = [  # row by row: scores and patterns of many tokens are large
            (wide(wanted[row]) - wide(found[row])).abs().max() / wide(scale[row]).abs().max().clamp(min=1e-30)
            for row in self.defined(site)
        ]
        return float(torch.stack(shares).max())

    def noise(self, site: str) -> float:
        """How far rounding alone takes rows apart at a site."""
        return self.distance(-1, site)

    def reaches(self, site: str) -> list[str]:
        """Sites that a write at ``site`` must move."""
        nearest, ahead = {"resid_post"} - {site}, list(self.feeds[site])
        for other in ahead:
            if other in self.rows:
                nearest.add(other)
            else:  # what a block does not show hands the change on
                ahead += [further for further in self.feeds[other] if further not in ahead]
        return [other for other in self.rows if other in nearest]

    def unmoved(self, site: str) -> list[str]:
        """Sites that a write at ``site`` must move, and did not."""
        row = self.rows[site]
        return [other for other in self.reaches(site) if self.distance(row, other) <= 2 * self.noise(other)]

    def spares(self, site: str) -> list[str]:
        """Sites that a write at ``site`` must leave as they are."""
        reached = {site}
        for other in BLOCK_SITES[BLOCK_SITES.index(site) :]:
            if other in reached:
                reached.update(self.feeds[other])
        return [other for other in self.rows if other not in reached]


Write = Callable[[str, Tensor], Tensor]
"""Given a site (without its layer) and one row's value there; returns what to write."""


def noisy(subject: Subject, amplitude: float) -> Write:
    """Adds normal noise of ``amplitude`` standard deviations of what is there."""

    def write(site: str, row: Tensor) -> Tensor:
        spread = row.float().std()
        spread = spread if torch.isfinite(spread) and spread > 0 else torch.ones_like(spread)
        return row + amplitude * spread.to(row.dtype) * subject.noise(row.shape)

    return write


def edited_block(subject: Subject, layer: int, sites: Sequence[str], write: Write) -> Edited:
    """Run one block, with a row for every site that is written to there."""
    kept: dict[str, Tensor] = {}
    rows = {site: row for row, site in enumerate(sites, start=1)}
    start = subject.values[f"blocks.{layer}.resid_pre"][:1]

    def visiting(site: str) -> Visitor:
        def visitor(value: Tensor) -> Tensor:
            if site == "resid_pre":
                value = start.expand(len(rows) + 2, *start.shape[1:])
            value = value.clone()
            value[rows[site]] = write(site, value[rows[site]])
            kept[site] = value
            return value

        return visitor

    visitors = {f"blocks.{layer}.{site}": visiting(site) for site in sites}
    subject.run(visitors, subject.vit.blank(1), skip=range(layer), stop=layer)
    return Edited(layer, kept, rows, _feeds(subject, layer))


def _feeds(subject: Subject, layer: int) -> dict[str, tuple[str, ...]]:
    feeds = PARALLEL if subject.layout.family.parallel else FEEDS
    attention = lookup(subject.vit.module, subject.layout.attention_path(layer))
    positional = any(isinstance(part, PositionalProjection) for part in attention.modules())
    return feeds | POSITIONAL if positional else feeds


def _distances(value: Tensor) -> list[float]:
    clean = value[0]
    scale = clean[torch.isfinite(clean)].abs().max().clamp(min=1e-30)
    # Scores are infinite where a mask forbids a key.
    apart = [torch.where(row == clean, 0.0, row - clean).abs().max() for row in value]
    return (torch.stack(apart) / scale).tolist()
