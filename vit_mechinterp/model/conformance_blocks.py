"""Checks inside the blocks: where a write goes, where it must not go, and what adds up to what.

Every block is run once on many rows, which start from one image's clean residual stream; each but two is
written to at one site of the block, so every identity is tested on values that were edited upstream of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_mechinterp.model.conformance_report import Record
from vit_mechinterp.model.conformance_subject import Subject, deviation, wide
from vit_mechinterp.model.instrument import Visitor
from vit_mechinterp.model.layout import is_missing, lookup
from vit_mechinterp.spec import BLOCK_SITES

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
PARALLEL = FEEDS | {"resid_pre": ("ln1", "ln2", "resid_post"), "attn_out": ("resid_post",)}
"""The same where attention and MLP read one input, and there is no resid_mid."""

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
        rows = self.defined(site)
        difference = (wide(wanted) - wide(self.values[site]))[rows].abs().flatten(1).amax(dim=1)
        scales = wide(scale)[rows].abs().flatten(1).amax(dim=1)
        return float((difference / scales.clamp(min=1e-30)).max())

    def noise(self, site: str) -> float:
        """How far rounding alone takes rows apart at a site."""
        return self.distance(-1, site)

    def reaches(self, site: str) -> list[str]:
        """Sites that a write at ``site`` must move."""
        nearest = {*self.feeds[site], "resid_post"} - {site}
        return [other for other in self.rows if other in nearest]

    def spares(self, site: str) -> list[str]:
        """Sites that a write at ``site`` must leave as they are."""
        reached = {site}
        for other in BLOCK_SITES[BLOCK_SITES.index(site) :]:
            if other in reached:
                reached.update(self.feeds[other])
        return [other for other in self.rows if other not in reached]


def writes_and_identities(subject: Subject, record: Record) -> None:
    """Both, block by block, then the way from every block's output to the model's."""
    check = record.check
    strangers = subject.layout.family.strangers(subject.vit.module)
    for layer in range(subject.layout.n_layers):
        if layer in strangers:
            continue
        sites = [name for name in BLOCK_SITES if f"blocks.{layer}.{name}" in subject.sites]
        if "resid_pre" not in sites:
            record.add(False, f"blocks.{layer}.resid_pre", "the block's input cannot be written")
            continue
        edited = None
        for amplitude in AMPLITUDES:
            edited = edited_block(subject, layer, sites, amplitude)
            if not any(_unmoved(edited, site) for site in sites):
                break
        assert edited is not None
        with record.under("a write goes downstream only"):
            for site in sites:
                _downstream_only(subject, edited, site, record)
        with record.under("residual stream adds up"):
            _residual_stream(subject, edited, record)
        with record.under("attention adds up"):
            _attention(subject, edited, record)
        with record.under("captures stay as they were"):
            for site, value in edited.values.items():
                clean = subject.values[edited.name(site)][:1]
                record.near(deviation(value[:1], clean), 10 * subject.unit, edited.name(site), "the value")
        with record.under("a pattern edit, by hand"):
            _pattern_by_hand(subject, edited, record)
    with record.under("a write reaches the output"):
        _reaches_output(subject, record)
    record.check = check


def edited_block(subject: Subject, layer: int, sites: Sequence[str], amplitude: float) -> Edited:
    """Run one block, with a row for every site that is written to there."""
    kept: dict[str, Tensor] = {}
    rows = {site: row for row, site in enumerate(sites, start=1)}
    start = subject.values[f"blocks.{layer}.resid_pre"][:1]

    def visiting(site: str) -> Visitor:
        def visitor(value: Tensor) -> Tensor:
            if site == "resid_pre":
                value = start.expand(len(rows) + 2, *start.shape[1:])
            value = value.clone()
            row = value[rows[site]]
            spread = row.float().std()
            spread = spread if torch.isfinite(spread) and spread > 0 else torch.ones_like(spread)
            row += amplitude * spread.to(value.dtype) * subject.noise(row.shape)
            kept[site] = value
            return value

        return visitor

    visitors = {f"blocks.{layer}.{site}": visiting(site) for site in sites}
    subject.run(visitors, subject.vit.blank(1), skip=range(layer), stop=layer)
    parallel = f"blocks.{layer}.resid_mid" in subject.layout.absent
    return Edited(layer, kept, rows, PARALLEL if parallel else FEEDS)


def _unmoved(edited: Edited, site: str) -> list[str]:
    row = edited.rows[site]
    return [other for other in edited.reaches(site) if edited.distance(row, other) <= 2 * edited.noise(other)]


def _downstream_only(subject: Subject, edited: Edited, site: str, record: Record) -> None:
    row = edited.rows[site]
    moved = [other for other in edited.spares(site) if edited.distance(row, other) > 4 * subject.unit]
    unmoved = _unmoved(edited, site)
    faults = [("it moved", moved), ("it did not move", unmoved)]
    text = "; ".join(f"{what} {', '.join(sites)}" for what, sites in faults if sites)
    record.add(not text, edited.name(site), text)


def _residual_stream(subject: Subject, edited: Edited, record: Record) -> None:
    """Every increment is what the stream grows by, to the last bit where nothing is derived."""
    values = edited.values
    sums = (("resid_mid", "resid_pre", "attn_out"), ("resid_post", "resid_mid", "mlp_out"))
    for site, start, increment in sums:
        if edited.has(site, start, increment):
            total = values[start] + values[increment]
            share = edited.deviation(site, total, values[site])
            record.near(share, subject.unit / 2, edited.name(site), f"{start} + {increment}")


def _attention(subject: Subject, edited: Edited, record: Record) -> None:
    """Rows of the pattern sum to 1, z is its mix of v, and the heads' results add up to attn_out."""
    values, allowed = edited.values, 4 * subject.unit

    def holds(site: str, wanted: Tensor, scale: Tensor, meaning: str) -> None:
        record.near(edited.deviation(site, wanted, scale), allowed, edited.name(site), meaning)

    if edited.has("attn.pattern"):
        pattern = values["attn.pattern"]
        sums = wide(pattern[edited.defined("attn.pattern")]).sum(dim=-1)
        off = float((sums - 1).abs().max())
        record.near(off, allowed, edited.name("attn.pattern"), "the sum over keys, from 1,")
        if edited.has("attn.scores"):
            soft = wide(values["attn.scores"]).softmax(dim=-1)
            holds("attn.pattern", soft, torch.ones_like(soft), "the softmax of the scores")
        if edited.has("attn.v", "attn.z"):
            v, applied = values["attn.v"], _applied(subject, edited.layer, pattern)
            holds("attn.z", _mix(applied, v), _mix(applied.abs(), v.abs()), "pattern @ v")
    if edited.has("attn.result", "attn_out"):
        result = wide(values["attn.result"])
        _, bias, gain = _projection(subject, edited.layer)
        total = result.sum(dim=-2) + (0 if bias is None else bias * gain)
        holds("attn_out", total, result.abs().sum(dim=-2), "the heads' results with the bias")


def _pattern_by_hand(subject: Subject, edited: Edited, record: Record) -> None:
    """z and the increments behind an edited pattern, computed from v and the weights."""
    if not edited.has("attn.pattern", "attn.v", "attn.z", "attn_out"):
        return
    weight, bias, gain = _projection(subject, edited.layer)

    def increment(z: Tensor) -> Tensor:
        return F.linear(z.flatten(-2), weight, bias) * gain

    values, allowed = edited.values, 10 * subject.unit
    row = edited.rows["attn.pattern"]

    def agrees(site: str, wanted: Tensor) -> None:
        record.near(deviation(wide(values[site][row]), wanted), allowed, edited.name(site), site)

    z = _mix(_applied(subject, edited.layer, values["attn.pattern"]), values["attn.v"])[row]
    agrees("attn.z", z)
    if deviation(increment(wide(values["attn.z"][0])), wide(values["attn_out"][0])) > allowed:
        return  # a norm or a gate stands between z and the projection
    agrees("attn_out", increment(z))
    if edited.has("resid_mid"):
        agrees("resid_mid", wide(values["resid_pre"][row]) + increment(z))


def _reaches_output(subject: Subject, record: Record) -> None:
    """Every block's output reaches the model's, in one forward with a row per block."""
    names = [f"blocks.{layer}.resid_post" for layer in range(subject.layout.n_layers)]
    rows = {name: row for row, name in enumerate(names, start=1) if name in subject.sites}

    def moving(name: str) -> Visitor:
        def visitor(value: Tensor) -> Tensor:
            value = value.clone()
            row = value[rows[name]]
            row += row.float().std().to(value.dtype) * subject.noise(row.shape)
            return value

        return visitor

    if subject.layout.family.one_image:
        for name in rows:
            rows[name] = 0
            moved = deviation(subject.output({name: moving(name)}), subject.native) > 0
            record.add(moved, name, "" if moved else "the output did not change")
        return
    images = torch.cat([subject.images[:1]] * (len(names) + 2))
    output = subject.run({name: moving(name) for name in rows}, images)
    assert output is not None
    noise = deviation(output[-1], output[0])
    for name, row in rows.items():
        moved = deviation(output[row], output[0]) > 2 * noise
        record.add(moved, name, "" if moved else "the output did not change")


def _projection(subject: Subject, layer: int) -> tuple[Tensor, Tensor | None, Tensor | float]:
    """Weight and bias of a block's output projection, and the LayerScale behind it."""
    family = subject.layout.family
    block: nn.Module = lookup(subject.vit.module, subject.layout.block_path(layer))
    projection: nn.Linear = lookup(block, family.out_projection)
    scales = [lookup(block, path) for path in family.attention_scale]
    gain = next((wide(scale) for scale in scales if not is_missing(scale)), 1.0)
    return wide(projection.weight), None if projection.bias is None else wide(projection.bias), gain


def _applied(subject: Subject, layer: int, pattern: Tensor) -> Tensor:
    """What multiplies v: the pattern, in families with talking heads mixed between heads."""
    mixing = subject.layout.family.mixing
    if mixing is None:
        return pattern
    return mixing(lookup(subject.vit.module, subject.layout.attention_path(layer)), pattern)


def _mix(pattern: Tensor, v: Tensor) -> Tensor:
    """``pattern @ v``, as z ``[batch, token, head, d_head]``; grouped queries share v."""
    v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhqk,bkhd->bqhd", wide(pattern), wide(v))


def _distances(value: Tensor) -> list[float]:
    # Scores are infinite where a mask forbids a key.
    apart = torch.where(value == value[:1], 0.0, value - value[:1]).abs().flatten(1).amax(dim=1)
    return (apart / value[0][torch.isfinite(value[0])].abs().max().clamp(min=1e-30)).tolist()
