"""Visits, skipped blocks and early stops on native models, against plain hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vit_mechinterp as vmi
from tests.model import raw
from tests.model.raw import moved, near
from tests.tiny_models import HF_CLIP, HF_VIT, MAIN, TIMM_PLAIN, TIMM_REGISTERS, Tiny
from vit_mechinterp.errors import ExecutionError, UnsupportedSiteError
from vit_mechinterp.model import HookedViT
from vit_mechinterp.model.instrument import Instrument, StopForward, Visitor
from vit_mechinterp.spec import Site

MODELS = pytest.mark.parametrize("tiny", MAIN, ids=lambda tiny: tiny.name)


def visiting(vit: HookedViT, **visitors: Visitor) -> Instrument:
    """An instrument with visitors at block 1, dots written as double underscores."""
    instrument = Instrument(vit.module, vit.layout)
    for name, visitor in visitors.items():
        instrument.visit(Site.parse(f"blocks.1.{name.replace('__', '.')}"), visitor)
    return instrument


@MODELS
@torch.no_grad()
def test_rows_join_behind_skipped_blocks(tiny: Tiny) -> None:
    module = tiny.module()
    vit = vmi.wrap(module)
    x = tiny.images(3)
    run = lambda: raw.native(module, x, vit.layout.output)  # noqa: E731
    rows = raw.block_input(module, 2, run) + torch.randn(3, tiny.n_tokens, vit.layout.d_model)
    wanted = raw.with_block_output(module, 1, lambda _: rows, run)
    ran: list[int] = []
    handles = [
        norm.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(raw.blocks_of(module))
        for norm in [next(part for part in block.modules() if isinstance(part, torch.nn.LayerNorm))]
    ]
    instrument = Instrument(module, vit.layout)
    instrument.skip([0, 1])
    instrument.visit(Site.parse("blocks.2.resid_pre"), lambda dummy: rows)
    with instrument.installed():
        found = vit(vit.blank(1))
    near(found, wanted)
    moved(wanted, run())
    assert ran[0] == 2
    for handle in handles:
        handle.remove()


@MODELS
@torch.no_grad()
def test_a_growing_batch_is_its_rows_alone(tiny: Tiny) -> None:
    module = tiny.module()
    vit = vmi.wrap(module)
    x, extra = tiny.images(2), tiny.images(1, seed=1)
    late = raw.block_output(module, 1, lambda: module(extra))
    instrument = visiting(vit, resid_post=lambda value: torch.cat([value, late]))
    with instrument.installed():
        found = vit(x)
    near(found, torch.cat([vit(x), vit(extra)]), 1e-5)


@torch.no_grad()
def test_a_forward_stops_where_it_is_told_to() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    x = TIMM_PLAIN.images(1)
    clean = vit(x)
    sites = [Site.parse(f"blocks.{name}") for name in ("1.resid_pre", "1.resid_post", "2.resid_post")]
    for before, fired in ((True, [1, 0, 0]), (False, [1, 1, 0])):
        instrument = Instrument(vit.module, vit.layout)
        for site in sites:
            instrument.visit(site, lambda value: None)
        instrument.stop(1, before=before)
        with instrument.installed(), pytest.raises(StopForward):
            vit(x)
        assert [instrument.fired[site] for site in sites] == fired
        assert torch.equal(vit(x), clean)


def test_a_stop_is_no_exception_that_a_model_could_swallow() -> None:
    assert not issubclass(StopForward, Exception)


@torch.no_grad()
def test_visits_at_one_site_follow_each_other() -> None:
    vit = vmi.wrap(TIMM_REGISTERS.module())
    x = TIMM_REGISTERS.images(1)
    for site in ("resid_mid", "attn__q", "attn__pattern", "attn__result", "mlp__pre_linear"):
        seen: list[Tensor] = []
        instrument = visiting(vit, **{site: lambda value: value + 1})
        name = Site.parse(f"blocks.1.{site.replace('__', '.')}")
        instrument.visit(name, seen.append)
        instrument.visit(name, torch.square)
        instrument.visit(name, seen.append)
        with instrument.installed():
            vit(x)
            instrument.verify()
        near(seen[1], seen[0].square())
        assert instrument.fired == {name: 1}


@pytest.mark.parametrize("tiny", [TIMM_REGISTERS, HF_VIT, HF_CLIP], ids=lambda tiny: tiny.name)
def test_a_write_to_resid_mid_reaches_both_readers_under_autograd(tiny: Tiny) -> None:
    vit, images = vmi.wrap(tiny.module().double()), tiny.images(2).double()
    direction = torch.zeros(vit.layout.d_model, dtype=torch.float64, requires_grad=True)
    instrument = visiting(vit, resid_mid=lambda value: value + direction)
    with instrument.installed():
        vit(images).square().sum().backward()
    analytic = direction.grad
    assert analytic is not None
    step = 1e-5 * torch.eye(vit.layout.d_model, dtype=torch.float64)[0]
    values = []
    for sign in (1, -1):
        with torch.no_grad(), vit.hooks({"blocks.1.resid_mid": lambda value, sign=sign: value + sign * step}):
            values.append(float(vit(images).square().sum()))
    slope = (values[0] - values[1]) / 2e-5
    assert slope == pytest.approx(float(analytic[0]), rel=1e-6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_resid_mid_is_written_back_only_where_somebody_wrote(context: type[torch.no_grad]) -> None:
    """Returned, or written in place into what was given; a visitor that only reads costs no second copy."""
    vit = vmi.wrap(HF_VIT.module())
    x = HF_VIT.images(2)
    norm: torch.nn.LayerNorm = raw.blocks_of(vit.module)[1].layernorm_after
    seen: list[tuple[Tensor, int | None]] = []

    def look(_: object, args: tuple[Tensor]) -> None:
        seen.append((args[0].clone(), None if args[0].is_inference() else args[0]._version))

    def through(visitor: Visitor) -> tuple[Tensor, int | None]:
        with context(), visiting(vit, resid_mid=visitor).installed():
            handle = norm.register_forward_pre_hook(look)
            vit(x)
            handle.remove()
        return seen[-1]

    kept: list[Tensor] = []
    read, untouched = through(kept.append)
    assert torch.equal(kept[0], read)
    for visitor in (lambda value: value + 1, lambda value: value.add_(1)):
        written, writes = through(visitor)
        assert torch.equal(written, read + 1)
        assert (untouched, writes) in ((0, 1), (None, None))


@torch.no_grad()
def test_heads_results_move_the_increment_by_their_sum() -> None:
    vit = vmi.wrap(TIMM_REGISTERS.module())
    x = TIMM_REGISTERS.images(2)
    _, clean = vit.run(x, ["blocks.1.attn.result", "blocks.1.attn_out"])
    result = clean["blocks.1.attn.result"]
    change = torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
    with vit.hooks({"blocks.1.attn.result": lambda value: value + change}):
        found, edited = vit.run(x, ["blocks.1.attn.result", "blocks.1.attn_out"])
    near(edited["blocks.1.attn.result"], result + change)
    near(edited["blocks.1.attn_out"], clean["blocks.1.attn_out"] + change.sum(-2), 1e-5)
    with vit.hooks({"blocks.1.attn_out": lambda value: value + change.sum(-2)}):
        near(found, vit(x), 1e-5)


@torch.no_grad()
def test_visits_are_counted_over_forwards() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    x = TIMM_PLAIN.images(1)
    instrument = visiting(vit, ln1=lambda value: None)
    with instrument.installed():
        instrument.verify()
        vit(x)
        vit(x)
        instrument.verify()
        vit.module.blocks[1](torch.zeros(1, 17, 24))
        with pytest.raises(
            ExecutionError,
            match=r"once in each of 2 forwards of VisionTransformer \(timm\.vit\): blocks\.1\.ln1 \(3\)",
        ):
            instrument.verify()


def test_sites_that_a_model_lacks_cannot_be_visited() -> None:
    vit = vmi.wrap(HF_CLIP.module())
    with pytest.raises(UnsupportedSiteError, match=r"ln_final: its last norm acts on CLS alone"):
        Instrument(vit.module, vit.layout).visit(Site.parse("ln_final"), lambda value: None)
