"""Mechanisms broken on purpose: the tap, skipping and writing, shared by every row, are held to the same checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vit_mechinterp as vmi
from tests.model.test_conformance import made
from tests.model.test_conformance_lies import named
from tests.zoo.transformers_models import build
from vit_mechinterp.model import instrument, visiting
from vit_mechinterp.model.attention_call import AttentionCall
from vit_mechinterp.model.conformance import check
from vit_mechinterp.model.instrument import Instrument
from vit_mechinterp.model.interception import Interception

EXPLICIT = Interception._explicit
VISIT = Interception._visit
BY_TOKEN = Interception._by_token
INSTALLED = Instrument.installed


def fused_beside(self: Any, call: AttentionCall) -> Tensor:
    """Shows a pattern, and goes on with the fused kernel."""
    EXPLICIT(self, call)
    return F.scaled_dot_product_attention(call.query, call.key, call.value, attn_mask=call.attn_mask, scale=call.scale)


def another_pattern(self: Any, site: str, x: Tensor) -> Tensor:
    """Shows the pattern with its heads in another order than the one that is used, and takes it back so."""
    return VISIT(self, site, x.flip(1)).flip(1) if site == "pattern" and site in self.visits else VISIT(self, site, x)


def columns_normalised(self: Any, site: str, x: Tensor) -> Tensor:
    """Shows the pattern with queries and keys exchanged."""
    exchanged = site == "pattern" and site in self.visits
    return VISIT(self, site, x.transpose(-2, -1)).transpose(-2, -1) if exchanged else VISIT(self, site, x)


def deaf_to(name: str) -> Callable[..., Tensor]:
    """Shows a site, and goes on with what was there."""

    def visit(self: Any, site: str, x: Tensor) -> Tensor:
        new = VISIT(self, site, x)
        return x if site == name else new

    return visit


def after_softmax(self: Any, site: str, x: Tensor) -> Tensor:
    """Shows what comes out of the softmax under the name of the scores."""
    if site != "scores" or site not in self.visits:
        return VISIT(self, site, x)
    return VISIT(self, site, x.softmax(-1)).log()


def unscaled(self: Any, call: AttentionCall) -> Tensor:
    """Forgets the scale."""
    return EXPLICIT(self, replace(call, scale=1.0))


def grouped_by_turns(self: Any, call: AttentionCall) -> Tensor:
    """Gives key and value heads to the queries by turns, and not in groups."""
    repeats = call.query.shape[1] // call.key.shape[1]
    key, value = (x.repeat(1, repeats, 1, 1) for x in (call.key, call.value))
    return EXPLICIT(self, call.with_parts(call.query, key, value))


def turned_heads(name: str) -> Callable[..., Tensor]:
    """Shows one site with its heads in the opposite order, and takes edits back so."""

    def by_token(self: Any, site: str, x: Tensor) -> Tensor:
        if site != name or site not in self.visits:
            return BY_TOKEN(self, site, x)
        return BY_TOKEN(self, site, x.flip(1)).flip(1)

    return by_token


def interleaved_heads(self: Any, site: str, x: Tensor) -> Tensor:
    """Splits the heads of the values as [d_head][head], where they are [head][d_head]."""
    if site != "v" or site not in self.visits:
        return BY_TOKEN(self, site, x)
    batch, heads, tokens, width = x.shape
    mixed = x.permute(0, 2, 1, 3).reshape(batch, tokens, width, heads).permute(0, 3, 1, 2)
    back = BY_TOKEN(self, site, mixed).permute(0, 2, 3, 1).reshape(batch, tokens, heads, width)
    return back.permute(0, 2, 1, 3)


@contextmanager
def slicing(self: Instrument) -> Iterator[Instrument]:
    """Skips blocks by cutting them off the model."""
    skipped, self._skipped = self._skipped, set()
    whole = self.module.blocks
    with INSTALLED(self):
        self.module.blocks = nn.Sequential(*(b for i, b in enumerate(whole) if i not in skipped))
        try:
            yield self
        finally:
            self.module.blocks = whole


def kept_by_reference(port: Any, args: Any, kwargs: Any, visit: Any) -> Any:
    """Gives visitors the very tensor that is written to in place, where another reader holds it."""
    if not port.in_place:
        return INPUT(port, args, kwargs, visit)
    value = args[0]
    new = visit(value)
    if new is not value:
        value.copy_(new)
    return None


INPUT = visiting.replace_input


@dataclass(frozen=True)
class Fault:
    """A mechanism, what stands in its place, and the check and the site at which it must show."""

    name: str
    place: tuple[Any, str]
    fake: Callable[..., Any]
    check: str
    site: str
    model: Callable[[], nn.Module] = made

    def __str__(self) -> str:
        return self.name


FAULTS = (
    Fault(
        "a pattern that is not the one used", (Interception, "_explicit"), fused_beside,
        "attention adds up", "blocks.0.attn.z",
    ),
    Fault(
        "a pattern whose edits are dropped with the fused kernel", (Interception, "_explicit"), fused_beside,
        "a write goes downstream only", "blocks.0.attn.pattern",
    ),
    Fault(
        "the pattern of other heads", (Interception, "_visit"), another_pattern,
        "attention adds up", "blocks.1.attn.z",
    ),
    Fault(
        "a pattern on its side", (Interception, "_visit"), columns_normalised,
        "attention adds up", "blocks.0.attn.pattern",
    ),
    Fault(
        "a pattern edit that is discarded", (Interception, "_visit"), deaf_to("pattern"),
        "a pattern edit, by hand", "blocks.0.attn.z",
    ),
    Fault(
        "an edit of the scores that is discarded", (Interception, "_visit"), deaf_to("scores"),
        "a write goes downstream only", "blocks.1.attn.scores",
    ),
    Fault(
        "an edit of z that is discarded", (Interception, "_visit"), deaf_to("z"),
        "a write goes downstream only", "blocks.0.attn.z",
    ),
    Fault(
        "scores after the softmax", (Interception, "_visit"), after_softmax,
        "attention adds up", "blocks.0.attn.pattern",
    ),
    Fault(
        "scores without their scale", (Interception, "_explicit"), unscaled, "capture only", "blocks.0.attn.scores",
    ),
    Fault(
        "keys and values under grouped queries, by turns", (Interception, "_explicit"), grouped_by_turns,
        "capture only", "blocks.1.attn.pattern", lambda: build("Sapiens2Model"),
    ),
    Fault(
        "queries in the opposite order of heads", (Interception, "_by_token"), turned_heads("q"),
        "heads stay apart", "blocks.0.attn.q",
    ),
    Fault(
        "keys in the opposite order of heads", (Interception, "_by_token"), turned_heads("k"),
        "scores are q times k", "blocks.1.attn.k",
    ),
    Fault(
        "z in the opposite order of heads", (Interception, "_by_token"), turned_heads("z"),
        "attention adds up", "blocks.1.attn.z",
    ),
    Fault(
        "heads split in the wrong order", (Interception, "_by_token"), interleaved_heads,
        "attention adds up", "blocks.0.attn.z",
    ),
    Fault(
        "skipping by slicing, under positions that differ between blocks", (Instrument, "installed"), slicing,
        "growth and skip", "blocks.2.resid_pre", named("vit_small_patch16_rope_mixed_224"),
    ),
    Fault(
        "a middle of the stream that is kept by reference", (instrument, "replace_input"), kept_by_reference,
        "captures outlive edits", "blocks.0.resid_mid",
    ),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_broken_mechanism_fails(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = vmi.wrap(fault.model())
    assert check(vit, progress=False).passed
    monkeypatch.setattr(*fault.place, fault.fake)
    report = check(vit, progress=False)
    assert fault.site in {row.site for row in report.failures if row.check == fault.check}, str(report)


def test_skipping_by_slicing_is_right_where_blocks_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Instrument, "installed", slicing)
    report = check(vmi.wrap(made()), progress=False)
    assert all(row.passed for row in report.rows if row.check == "growth and skip"), str(report)


def test_keys_and_values_are_seen_as_they_enter_the_call() -> None:
    """transformers leaves the grouping to the kernel; timm repeats keys and values in front of it."""
    shared, repeated = vmi.wrap(build("Sapiens2Model")), vmi.wrap(named("vit_large_patch16_sapiens2")())
    for name in ("k", "v"):
        assert [shared.sites()[f"blocks.{layer}.attn.{name}"].shape[1] for layer in range(3)] == [4, 2, 4]
        assert [repeated.sites()[f"blocks.{layer}.attn.{name}"].shape[1] for layer in range(3)] == [4, 4, 4]
        x = torch.randn(1, *repeated.layout.tokens.input_shape)
        value = repeated.run(x, capture=[f"blocks.1.attn.{name}"])[1][f"blocks.1.attn.{name}"]
        assert torch.equal(value[:, :, 0], value[:, :, 1])
        assert not torch.equal(value[:, :, 1], value[:, :, 2])
