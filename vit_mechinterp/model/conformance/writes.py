"""Checks inside the blocks: where a write goes, where it must not go, and what adds up to what.

Identities are tested on values that were edited upstream of them, where an edit that got lost would show.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_mechinterp.model.conformance.blocks import AMPLITUDES, Edited, edited_block, noisy
from vit_mechinterp.model.conformance.inside import (
    gate_and_linear,
    heads_stay_apart,
    names_differ,
    post_is_made_of_pre,
    scores_of_queries_and_keys,
)
from vit_mechinterp.model.conformance.report import Record
from vit_mechinterp.model.conformance.subject import Subject, deviation, returning, wide
from vit_mechinterp.model.instrument import Visitor
from vit_mechinterp.model.layout import lookup
from vit_mechinterp.spec import BLOCK_SITES, GLOBAL_SITES


def interchange_with_itself(subject: Subject, record: Record) -> None:
    """Writing at one site what another forward on the same image had there changes nothing downstream."""
    for layer in subject.layers:
        sites = [name for name in BLOCK_SITES if f"blocks.{layer}.{name}" in subject.sites]
        if "resid_pre" not in sites or "resid_post" not in sites:
            record.add(False, f"blocks.{layer}", "its input or its output does not fire as declared")
            continue
        names = {site: f"blocks.{layer}.{site}" for site in sites}
        written = edited_block(subject, layer, sites, lambda site, row: subject.values[names[site]][0])  # noqa: B023
        for site in sites:
            share = written.distance(written.rows[site], "resid_post")
            record.near(share, 4 * subject.unit, names[site], "the block's output")
    for name in (name for name in GLOBAL_SITES if name in subject.sites):
        output = subject.output({name: returning(subject.values[name].clone())})
        record.near(deviation(output, subject.native), 0, name, "the output")


def writes_and_identities(subject: Subject, record: Record) -> None:
    """Both, block by block, then the way from every block's output to the model's."""
    check = record.check
    for layer in subject.layers:
        sites = [name for name in BLOCK_SITES if f"blocks.{layer}.{name}" in subject.sites]
        if "resid_pre" not in sites:
            record.add(False, f"blocks.{layer}.resid_pre", "the block's input cannot be written")
            continue
        edited = None
        for amplitude in AMPLITUDES:
            edited = edited_block(subject, layer, sites, noisy(subject, amplitude))
            if not any(edited.unmoved(site) for site in sites):
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
                allowed = 10 * subject.unit
                if site == "attn.pattern" and "attn.scores" in edited.values:
                    # Rounding moves scores by a share of their size, and their softmax by as much as them.
                    scores = wide(edited.values["attn.scores"][:1])
                    allowed *= max(1.0, float(scores[torch.isfinite(scores)].abs().max()) / 4)
                record.near(deviation(value[:1], clean), allowed, edited.name(site), "the value")
        with record.under("a pattern edit, by hand"):
            _pattern_by_hand(subject, edited, record)
        with record.under("scores are q times k"):
            scores_of_queries_and_keys(subject, edited, record)
        with record.under("heads stay apart"):
            heads_stay_apart(subject, layer, sites, record)
        with record.under("names mean what they say"):
            names_differ(subject, layer, sites, record)
            gate_and_linear(subject, layer, sites, record)
            post_is_made_of_pre(subject, layer, sites, record)
    with record.under("a write reaches the output"):
        _reaches_output(subject, record)
    record.check = check


def _downstream_only(subject: Subject, edited: Edited, site: str, record: Record) -> None:
    row = edited.rows[site]
    moved = [other for other in edited.spares(site) if edited.distance(row, other) > 4 * subject.unit]
    unmoved = edited.unmoved(site)
    faults = [("it moved", moved), ("it did not move", unmoved)]
    text = "; ".join(f"{what} {', '.join(sites)}" for what, sites in faults if sites)
    record.add(not text, edited.name(site), text)


def _residual_stream(subject: Subject, edited: Edited, record: Record) -> None:
    """Every increment is what the stream grows by, to the last bit where nothing is derived."""
    values = edited.values
    sums: list[tuple[str, tuple[str, ...]]]
    sums = [("resid_mid", ("resid_pre", "attn_out")), ("resid_post", ("resid_mid", "mlp_out"))]
    if subject.layout.family.parallel:
        sums = [("resid_post", ("resid_pre", "attn_out", "mlp_out"))]
    for site, parts in sums:
        if edited.has(site, *parts):
            total = sum((values[part] for part in parts[1:]), values[parts[0]])
            share = edited.deviation(site, total, values[site])
            allowed = subject.unit / 2 if len(parts) == 2 else subject.unit
            record.near(share, allowed, edited.name(site), " + ".join(parts))
            continue
        for part in (site, *parts):
            if reason := subject.layout.absent.get(edited.name(part)):
                record.leave_out(edited.name(site), f"no {part}: {reason}")
                break


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
        _, bias, gain = subject.projection(edited.layer)
        total = result.sum(dim=-2) + (0 if bias is None else bias * gain)
        meaning = "the heads' results with the bias"
        share = edited.deviation("attn_out", total, result.abs().sum(dim=-2))
        hint = "" if share <= allowed else _on_the_way(subject, edited, total)
        record.near(share, allowed, edited.name("attn_out"), meaning, hint)


def _on_the_way(subject: Subject, edited: Edited, total: Tensor) -> str:
    """What stands between the output projection and the increment, where it is one number per channel."""
    family = subject.layout.family
    declared = ", ".join(map(repr, family.attention_scale)) or "none"
    found, made = wide(edited.values["attn_out"])[0], total[0]
    scale = (found * made).sum(dim=0) / (made * made).sum(dim=0).clamp(min=1e-30)
    if deviation(made * scale, found) > 1e-3:
        path = family.out_projection
        return f"more stands between {path} and attn_out than attention_scale ({declared}) says"
    block = lookup(subject.vit.module, subject.layout.block_path(edited.layer))
    vectors = {path: wide(p) for path, p in block.named_parameters() if p.shape == scale.shape}
    if family.attention_scale:
        return f"the vector that multiplies them is another than attention_scale ({declared})"
    near = [path for path, vector in vectors.items() if deviation(scale, vector) <= 1e-3]
    named = f" ({near[0]!r} holds its values)" if near else ""
    return f"a vector multiplies them (LayerScale){named}: declare its path from the block in attention_scale"


def _pattern_by_hand(subject: Subject, edited: Edited, record: Record) -> None:
    """z and the increments behind an edited pattern, computed from v and the weights."""
    for site in ("attn.pattern", "attn.v", "attn.z", "attn_out"):
        if not edited.has(site):
            if reason := subject.layout.absent.get(edited.name(site)):
                record.leave_out(edited.name("attn.pattern"), f"no {site}: {reason}")
            return
    weight, bias, gain = subject.projection(edited.layer)

    def increment(z: Tensor) -> Tensor:
        return F.linear(z.flatten(-2), weight, bias) * gain

    values, allowed = edited.values, 4 * subject.unit
    row = edited.rows["attn.pattern"]

    def agrees(site: str, wanted: Tensor) -> None:
        record.near(deviation(wide(values[site][row]), wanted), allowed, edited.name(site), site)

    z = _mix(_applied(subject, edited.layer, values["attn.pattern"]), values["attn.v"])[row]
    agrees("attn.z", z)
    if deviation(increment(wide(values["attn.z"][0])), wide(values["attn_out"][0])) > allowed:
        record.leave_out(edited.name("attn_out"), "more than the output projection stands between z and it")
        return
    agrees("attn_out", increment(z))
    if edited.has("resid_mid"):
        agrees("resid_mid", wide(values["resid_pre"][row]) + increment(z))


def _reaches_output(subject: Subject, record: Record) -> None:
    """Every block's output reaches the model's, in one forward with a row per block."""
    names = [f"blocks.{layer}.resid_post" for layer in range(subject.layout.n_layers)]
    rows = {name: row for row, name in enumerate(names, start=1) if name in subject.sites}
    write = noisy(subject, 1)

    def moving(name: str) -> Visitor:
        def visitor(value: Tensor) -> Tensor:
            value = value.clone()
            value[rows[name]] = write(name, value[rows[name]])
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
