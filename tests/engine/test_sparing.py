"""Parts of a joining block run once for rows that are still equal there, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vit_mechinterp as vmi
from tests.engine.world import World, world_of
from tests.tiny_models import (
    HF_CLIP,
    HF_DINOV2,
    HF_VIT,
    TIMM_PLAIN,
    TIMM_POOLED,
    TIMM_REGISTERS,
    Tiny,
    stirred,
)
from tests.zoo.shrink import shrunk
from vit_mechinterp import Run

Document = dict[str, Any]
SITES = ("ln1", "attn.q", "attn.v", "attn.scores", "attn.pattern", "attn.z", "attn.result", "attn_out", "resid_mid",
         "ln2", "mlp.pre", "mlp.post")  # fmt: skip


def pushes(world: World, layer: int, site: str, n: int) -> list[Document]:
    """Runs that push CLS and a token of their own at one site."""
    cls = ["cls"] if "cls" in world.tiny.prefix else []
    d = world.shape(f"blocks.{layer}.{site}")[-1]
    push = {"op": "add_direction", "site": f"blocks.{layer}.{site}", "vector": f"direction.{d}", "alpha": 3.0}
    return [
        {"name": f"{layer}.{site}.{token}", "interventions": [{**push, "tokens": [*cls, token]}], "capture": []}
        for token in range(n)
    ]


class Inside:
    """Rows that modules are really computed for, seen by shadowing what they call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, int] = {}
        native = {"linear": torch.nn.functional.linear, "attend": torch.nn.functional.scaled_dot_product_attention}

        def linear(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
            key = f"linear {tuple(weight.shape)}"
            self.rows[key] = self.rows.get(key, 0) + len(x)
            return native["linear"](x, weight, *args)

        monkeypatch.setattr(torch.nn.functional, "linear", linear)


@pytest.mark.parametrize(
    ("site", "qkv", "projection", "first", "last"),
    [
        ("resid_pre", 8, 8, 8, 8),
        ("attn.z", 2, 8, 8, 8),
        ("attn_out", 2, 2, 8, 8),
        ("ln2", 2, 2, 8, 8),
        ("mlp.pre", 2, 2, 2, 8),
        ("mlp.post", 2, 2, 2, 8),
    ],
)
def test_a_part_before_the_edits_runs_once_per_image(
    site: str, qkv: int, projection: int, first: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(TIMM_POOLED, 2)  # its output reads every token, so no block is narrowed
    world.vit.sites()
    documents = pushes(world, 2, site, 4)
    inside = Inside(monkeypatch)
    for _ in range(2):  # the second time, values may be seen through views
        inside.rows.clear()
        results = world.execute(documents, batch_size=8)
        clean = 2 * 2  # two images in two blocks
        assert inside.rows["linear (72, 24)"] == clean + qkv
        assert inside.rows["linear (24, 24)"] == clean + projection
        assert inside.rows["linear (96, 24)"] == clean + first
        assert inside.rows["linear (24, 96)"] == clean + last
    monkeypatch.undo()
    world.check(documents, results)


@pytest.mark.parametrize(
    ("site", "qkv", "projection", "first"),
    [("attn_out", 9, 9, 12), ("resid_mid", 9, 9, 12), ("mlp.post", 9, 9, 12), ("attn.z", 12, 12, 12), ("attn.v", 12, 12, 12)],
)
def test_rows_start_from_clean_values_inside_a_block_that_clean_forwards_pass(
    site: str, qkv: int, projection: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of each image at each layer, so that none shares its block with another."""
    world = World(TIMM_POOLED, 2)
    world.vit.sites()
    documents = [pushes(world, layer, site, 1)[0] for layer in (0, 1)] + [pushes(world, 2, "resid_pre", 1)[0]]
    plan = vmi.plan(world.vit, list(map(Run.model_validate, documents)), world.columns)
    assert ("are given clean values there" in str(plan)) == (plan.spared > 0) == (site not in ("attn.z", "attn.v"))
    inside = Inside(monkeypatch)
    for _ in range(2):
        inside.rows.clear()
        results = world.execute(documents)
        clean = 2 * 2  # two images in two blocks
        # Two rows in the first block, four in the second, six in the last; of rows that are given their values, a blank
        # one passes if there are no others.
        assert inside.rows["linear (72, 24)"] == clean + qkv
        assert inside.rows["linear (24, 24)"] == clean + projection
        assert inside.rows["linear (96, 24)"] == clean + first
        assert inside.rows["linear (24, 96)"] == clean + 12
    monkeypatch.undo()
    world.check(documents, results)
    # Where clean forwards do not pass through the block, nobody lets them.
    alone = documents[:1]
    assert vmi.plan(world.vit, Run.model_validate(alone[0]), world.columns).block_evaluations == 2 * 3
    world.check(alone, world.execute(alone))


@pytest.mark.parametrize("passed", ["clean run", "own capture", "blank run"])
def test_what_lets_a_base_pass_through_a_block(passed: str) -> None:
    """A run that wants its output; not one whose rows start blank, nor what is captured before the edit, which rows that
    pass the whole block show themselves."""
    world = world_of(TIMM_POOLED, 3)
    silent = {"op": "ablate", "site": "blocks.0.attn_out", "tokens": [2]}
    late: Document = {"name": "late", "interventions": [silent]}
    if passed == "own capture":
        late["capture"] = ["blocks.0.attn.z"]
    zeros = {"op": "ablate", "site": "blocks.2.resid_pre", "tokens": "all"}
    others = {"clean run": [{"name": "clean"}], "blank run": [{"name": "blank", "interventions": [zeros]}]}
    documents = [*others.get(passed, []), late]
    plan = vmi.plan(world.vit, list(map(Run.model_validate, documents)), world.columns)
    assert (plan.spared > 0) == (passed == "clean run")
    clean, blank = {"clean run": (9, 0), "own capture": (0, 0), "blank run": (0, 1)}[passed]
    assert plan.block_evaluations == clean + blank + 9
    world.check(documents, world.execute(documents), effect=None)


@pytest.mark.parametrize(
    "tiny", [TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED, HF_VIT, HF_DINOV2, HF_CLIP], ids=lambda tiny: tiny.name
)
def test_every_mixture_of_sites_gives_what_one_run_at_a_time_gives(tiny: Tiny) -> None:
    world = world_of(tiny, 3)
    documents = [
        {**document, "capture": [f"blocks.1.{SITES[(n + k) % len(SITES)]}" for k in (3, 7)]}
        for n, site in enumerate(SITES)
        for document in pushes(world, 1, site, 2)
    ]
    documents += pushes(world, 0, "resid_post", 2) + pushes(world, 2, "mlp.post", 3)
    plan = vmi.plan(world.vit, list(map(Run.model_validate, documents)), world.columns, batch_size=200)
    assert plan.spared > 0
    assert "share the part of it before their edits" in str(plan)
    for batch_size in (200, 24, 5):
        world.check(documents, world.execute(documents, batch_size=batch_size))


def test_hooks_of_other_people_see_every_row() -> None:
    world = World(TIMM_PLAIN, 1)
    seen: list[int] = []
    for module in (world.module.blocks[2].norm1, world.module.blocks[2].attn.qkv, world.module.blocks[2].attn.proj):
        module.register_forward_hook(lambda m, args, output: seen.append(len(output)))
    documents = pushes(world, 2, "mlp.post", 4)
    world.vit.sites()
    for _ in range(2):
        seen.clear()
        world.execute(documents, batch_size=4)
        assert seen == [4, 4, 4]


def test_nothing_is_left_behind_when_a_wave_fails() -> None:
    world = World(TIMM_PLAIN, 2)
    documents = pushes(world, 2, "mlp.post", 4)
    world.vit.sites()
    before = {name: dict(vars(module)) for name, module in world.module.named_modules()}

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    hook = world.module.norm.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        world.execute(documents, batch_size=8)
    hook.remove()
    assert {name: dict(vars(module)) for name, module in world.module.named_modules()} == before


def test_a_part_that_sees_other_values_than_expected_runs_for_every_row() -> None:
    world = World(TIMM_PLAIN, 2)
    block = world.module.blocks[2]
    world.vit.sites()
    noise = torch.randn(8, 17, 24, generator=torch.Generator().manual_seed(3))

    def stir(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0] + noise[: len(args[0])],)

    hook = block.norm2.register_forward_pre_hook(stir)
    documents = pushes(world, 2, "mlp.post", 4)
    runs = list(map(Run.model_validate, documents))
    tensors = world.named(documents)
    together = vmi.execute(world.vit, runs, world.columns, tensors, batch_size=8, progress=False)
    hook.remove()
    wanted = []
    start = world.vit.run(world.columns["base"], capture=["blocks.2.resid_pre"])[1]["blocks.2.resid_pre"]
    hook = block.norm2.register_forward_pre_hook(stir)

    def push(h: torch.Tensor) -> torch.Tensor:
        for row in range(8):
            h[row, [0, 1 + row // 2]] += 3.0 * tensors["direction.96"]
        return h

    order = start[[0, 1] * 4]
    with world.vit.hooks({"blocks.2.resid_pre": lambda h: order, "blocks.2.mlp.post": push}):
        wanted = world.vit(world.columns["base"][[0, 1] * 4])
    hook.remove()
    found = together.logits.flatten(0, 1)
    assert torch.allclose(found, wanted, atol=1e-4 * world.scale)


def test_layers_that_read_scores_are_no_projections_of_the_input() -> None:
    """CaiT's heads talk: two of its attention's linear layers read scores and patterns, behind edits of q."""
    torch.manual_seed(0)
    vit = vmi.wrap(stirred(shrunk("cait_xxs24_224")).eval())
    data = {"base": torch.randn(2, *vit.layout.tokens.input_shape)}
    for site in ("attn.z", "attn.q"):  # the first time a module is spared, its input is looked at
        place = f"blocks.0.{site}"
        v = torch.randn(vit.sites()[place].shape[-1])
        runs = [
            vmi.Run(name=f"{n}", interventions=[vmi.AddDirection(site=place, tokens=[n], vector=vmi.TensorRef(name="v"))])
            for n in range(4)
        ]
        found = vmi.execute(vit, runs, data, {"v": v}, progress=False)
        assert vmi.plan(vit, runs, data).spared > 0
        for n, run in enumerate(runs):

            def push(h: torch.Tensor, n: int = n, v: torch.Tensor = v) -> None:
                h[:, n] += v

            with torch.no_grad(), vit.hooks({place: push}):
                wanted = vit(data["base"])
            assert torch.allclose(found[run.name], wanted, atol=1e-5 * float(wanted.abs().max()))
            assert not torch.allclose(wanted, vit(data["base"]), atol=1e-3)
