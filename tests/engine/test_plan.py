"""A plan's integer is the work that is done: counted with hooks on a part that runs only when its block runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vit_mechinterp as vmi
from tests.engine.world import Counted, World, world_of
from tests.tiny_models import HF_CLIP, HF_DINOV2, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, Tiny
from vit_mechinterp import HookedViT, Interchange, Run, Sweep
from vit_mechinterp.errors import DataError

Document = dict[str, Any]
TWELVE = replace(
    TIMM_PLAIN,
    name="twelve",
    build=lambda: VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=12, num_heads=3, num_classes=5
    ),
)


def swap(site: str, source: Any = "source", **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": source, "tokens": ["cls", 2], **fields}


def run(name: str, *edits: Document, **fields: Any) -> Document:
    return {"name": name, "interventions": list(edits), **fields}


EXPERIMENTS: dict[str, list[Document]] = {
    "sweep of outputs": [run(f"{layer}", swap(f"blocks.{layer}.resid_post")) for layer in range(3)],
    "every kind of join": [
        run("a", swap("embed")),
        run("b", swap("blocks.0.resid_pre")),
        run("c", swap("blocks.0.resid_mid")),
        run("d", swap("blocks.1.mlp_out")),
        run("e", swap("blocks.1.resid_post")),
        run("f", swap("blocks.2.attn.pattern")),
        run("g", swap("pooled", tokens="all")),
        run("h", swap("logits", tokens="all")),
    ],
    "late sites only": [run("a", swap("blocks.2.resid_post")), run("b", swap("pooled", tokens="all"))],
    "one early site": [run("a", {"op": "ablate", "site": "embed", "tokens": [1]})],
    "clean runs": [{"name": "a"}, {"name": "b", "base": "source", "capture": ["blocks.0.attn.z"]}],
    "clean and edited": [
        {"name": "a"},
        run("b", swap("blocks.1.attn.k"), capture=["blocks.0.ln1", "blocks.2.ln1"]),
    ],
    "an early source of a late edit": [run("a", swap("blocks.2.resid_post", source_site="embed"))],
    "a late source of an early edit": [run("a", swap("blocks.0.resid_post", source_site="ln_final"))],
    "base as its own source": [run("a", swap("blocks.1.resid_mid", "base", source_tokens=[3, 1]))],
    "computed means": [
        run("a", {"op": "ablate", "site": "blocks.1.attn.z", "method": "mean"}),
        run(
            "b",
            {"op": "ablate", "site": "blocks.2.mlp_out", "method": "mean", "pool_tokens": True},
            base="source",
        ),
    ],
    "resampling": [
        run("a", {"op": "ablate", "site": "blocks.1.attn.z", "method": "resample", "seed": 1}),
        run("b", {"op": "ablate", "site": "blocks.0.mlp_out", "method": "resample", "seed": 4}),
    ],
    "resampling and clean outputs": [
        run("a", {"op": "ablate", "site": "embed", "method": "resample", "seed": 1}),
        {"name": "clean"},
    ],
    "runs that read runs": [
        run("receiver", swap("blocks.1.attn.q", {"run": "sender"})),
        run("sender", swap("blocks.0.mlp_out")),
        run("last", swap("blocks.2.mlp_out", {"run": "receiver"})),
        run("reads a clean value", swap("blocks.2.resid_post", {"run": "sender"}, source_site="embed")),
    ],
    "a base of its own": [
        run("a", swap("blocks.0.resid_post")),
        run("b", swap("blocks.1.ln2", "base"), base="source"),
    ],
}


def executed(vit: HookedViT, runs: list[Run], data: Any, **options: Any) -> tuple[int, vmi.Results]:
    with Counted(vit.module) as counted:
        results = vmi.execute(vit, runs, data, progress=False, **options)
    return counted.total, results


def test_a_sweep_over_twelve_layers_costs_less_than_seven_and_a_half_forwards() -> None:
    vit = vmi.wrap(TWELVE.module())
    sweep = Sweep(
        interventions=[Interchange(site="blocks.0.resid_post", source="source", tokens=["cls", 3])],
        over={"layer": "all"},
    )
    plan = vmi.plan(vit, sweep)
    assert plan.forwards <= 7.5
    # The run of layer 11 is its source's own forward: all that the output reads of the last block is replaced.
    assert plan.block_evaluations == 11 + 12 + sum(range(1, 12))
    assert plan.naive_forwards == 24
    assert plan.n_examples is None
    text = str(plan)
    assert "7.417 forwards' worth of blocks (89 block evaluations) instead of 24 (288)" in text
    assert "layer0: joins at the output of block 0, 11 blocks; interchange at blocks.0.resid_post" in text
    assert "source: 1 x 12 blocks" in text
    assert "base: 1 x 11 blocks" in text

    data = {"base": TWELVE.images(3, 1), "source": TWELVE.images(3, 2)}
    vit.sites()
    for batch_size in ("auto", 36, 5, 1):
        total, _ = executed(vit, sweep.runs(12), data, batch_size=batch_size)
        assert total == 3 * 89 == vmi.plan(vit, sweep, data, batch_size=batch_size).block_evaluations


@pytest.mark.parametrize("batch_size", [64, 5, 2])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_executed_blocks_are_the_plans(name: str, batch_size: int) -> None:
    world = world_of(TIMM_PLAIN, 6)
    runs = [Run.model_validate(document) for document in EXPERIMENTS[name]]
    plan = vmi.plan(world.vit, runs, world.columns, batch_size=batch_size)
    world.vit.sites()
    with Counted(world.module) as counted:
        results = world.execute(EXPERIMENTS[name], batch_size=batch_size)
    assert counted.total == plan.block_evaluations <= plan.naive_block_evaluations
    assert counted.launches == plan.launches
    assert plan.n_examples == 6
    assert plan.width == batch_size
    world.check(EXPERIMENTS[name], results, effect=None)


@pytest.mark.parametrize("tiny", [TIMM_REGISTERS, HF_DINOV2, HF_CLIP], ids=lambda tiny: tiny.name)
def test_executed_blocks_are_the_plans_on_other_models(tiny: Tiny) -> None:
    world = world_of(tiny, 5)
    documents = [
        {**document, "name": f"{name} {document['name']}"}
        for name, documents in EXPERIMENTS.items()
        if name not in ("runs that read runs", "a late source of an early edit")
        for document in documents
    ]
    runs = [Run.model_validate(document) for document in documents]
    plan = vmi.plan(world.vit, runs, world.columns, batch_size=7)
    total, results = executed(world.vit, runs, world.columns, batch_size=7)
    assert total == plan.block_evaluations
    world.check(documents, results, effect=None)


@pytest.mark.parametrize(
    ("edit", "rows"),
    [
        # Base to block 1, source to block 0, and the edited rows from block 2 on.
        (swap("blocks.1.resid_post", source_site="blocks.0.resid_post"), [8, 4, 4]),
        (swap("blocks.2.resid_pre", source_site="blocks.1.resid_pre"), [8, 4, 4]),
        (swap("blocks.1.attn.z"), [8, 8, 4]),
        (swap("embed"), [4, 4, 4]),
        (swap("blocks.2.mlp_out", source_site="embed"), [4, 4, 4]),
        (swap("blocks.0.mlp_out"), [8, 4, 4]),
    ],
)
def test_blocks_that_nobody_needs_do_not_run(edit: Document, rows: list[int]) -> None:
    world = World(TIMM_PLAIN, 4)
    world.vit.sites()
    with Counted(world.module) as counted:
        vmi.execute(world.vit, [Run.model_validate(run("a", edit))], world.columns, progress=False)
    assert counted.rows == rows


def test_a_plan_runs_no_model() -> None:
    world = world_of(TIMM_PLAIN, 6)
    world.vit.sites()
    runs = [Run.model_validate(document) for document in EXPERIMENTS["runs that read runs"]]
    with Counted(world.module) as counted:
        str(vmi.plan(world.vit, runs, world.columns))
        str(vmi.plan(world.vit, runs))
    assert counted.total == 0


def test_a_plan_says_why_more_is_computed() -> None:
    world = world_of(TIMM_PLAIN, 6)

    def text(name: str, batch_size: Any = "auto", chunk: int = 6) -> str:
        runs = [Run.model_validate(document) for document in EXPERIMENTS[name]]
        memory = world.memory(EXPERIMENTS[name], chunk, batch_size) if chunk < 6 else None
        return str(vmi.plan(world.vit, runs, world.columns, batch_size=batch_size, memory=memory))

    assert "note: dataset means need a pass of their own, because the dataset spans several chunks" in text(
        "computed means", 4, 4
    )
    assert "dataset means" not in text("computed means", 4)
    assert "note: resampled images of 'base' lie in other chunks" in text("resampling", 4, 4)
    assert "resampled images" not in text("resampling", 4)
    assert "note: runs that read other edited runs wait for them, in stages" in text("runs that read runs")
    assert "rows that join one growing batch (stage 3)" in text("runs that read runs")
    assert "2 chunks of up to 4 examples, at most 4 rows each" in text("resampling", 4, 4)
    assert "note: edits inside a block (blocks.1.attn.k) join at its input" in text("clean and edited")


def test_a_plan_names_clean_runs_and_counts_in_words() -> None:
    world = world_of(TIMM_PLAIN, 1)
    clean = vmi.plan(world.vit, [Run(name="untouched")], {"base": world.columns["base"]}, batch_size=64)
    text = str(clean)
    assert clean.clean_runs == ("untouched",)
    assert "Plan for 1 example on VisionTransformer (3 blocks)" in text
    assert "1 launch, 1 chunk of up to 1 example, at most 1 row each" in text
    assert "runs that clean forwards answer: untouched" in text
    last = Run.model_validate(run("a", swap("blocks.1.resid_post")))
    assert "joins at the output of block 1, 1 block; interchange" in str(vmi.plan(world.vit, [last]))


def test_a_plan_prints_the_widest_forward_that_occurs(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(TIMM_PLAIN, 6)
    runs = [Run.model_validate(document) for document in EXPERIMENTS["sweep of outputs"]]
    plan = vmi.plan(world.vit, runs, world.columns, batch_size=1000)
    sizes: list[int] = []
    native = torch.nn.functional.layer_norm

    def layer_norm(x: Tensor, *args: Any) -> Tensor:
        sizes.append(len(x))
        return native(x, *args)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", layer_norm)
    vmi.execute(world.vit, runs, world.columns, batch_size=1000, progress=False)
    assert plan.widest == max(sizes) == 12
    assert "at most 12 rows each" in str(plan)


def test_own_hooks_on_skipped_blocks_see_a_blank_row() -> None:
    world = World(TIMM_PLAIN, 4)
    world.vit.sites()
    edit = Run.model_validate(run("a", swap("blocks.2.resid_post", source_site="embed")))
    seen: list[int] = []
    world.module.blocks[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    vmi.execute(world.vit, [edit], world.columns, progress=False)
    # The images' own forward, and the one whose rows join behind the last block.
    assert len(seen) >= 2
    assert 1 in seen


def test_chunks_of_a_whole_stream_of_other_examples_are_not_alike() -> None:
    """Where a clean forward of another example's image answers a run, chunks hold different images."""
    world = world_of(TIMM_POOLED, 5)
    resample = {"op": "ablate", "method": "resample", "site": "blocks.0.resid_post", "seed": 0}
    documents = [
        {"name": "other", "interventions": [resample]},
        {"name": "seen", "base": "source", "interventions": [swap("blocks.1.attn.q", "base", tokens=[3])]},
    ]
    options: dict[str, Any] = {"batch_size": 3, "memory": world.memory(documents, 2, 3)}
    plan = vmi.plan(world.vit, [Run.model_validate(own) for own in documents], world.columns, **options)
    assert plan.chunk == 2
    with Counted(world.module) as counted:
        results = world.execute(documents, **options)
    assert (counted.total, counted.launches) == (plan.block_evaluations, plan.launches)
    world.check(documents, results, effect=None)


def test_a_plan_refuses_images_that_the_model_cannot_take() -> None:
    world = world_of(TIMM_PLAIN)
    run = Run.model_validate({"name": "swap", "interventions": [swap("blocks.1.resid_post")]})
    other = {**world.columns, "source": torch.zeros(world.n, 3, 8, 8)}
    said = []
    for refusing in (lambda: vmi.plan(world.vit, run, other), lambda: vmi.execute(world.vit, run, other)):
        with pytest.raises(DataError, match="'source'") as error:
            refusing()
        said.append(str(error.value))
    assert said[0] == said[1]
