"""Runs that begin with the same interventions are one until they part, and what is read of each is its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.engine.test_reach import LAST, push, rows, run, swap
from tests.engine.test_sharing import repeating
from tests.engine.world import Counted, World, world_of
from tests.tiny_models import HF_DINOV2, TIMM_PLAIN, TIMM_POOLED, Tiny
from vit_mechinterp import ActivationStore, Run
from vit_mechinterp.engine.scheduling.footprint import footprint

Document = dict[str, Any]
NOISE = push("embed", "patches", 3.0)


def restored(site: str, *tokens: Any) -> Document:
    """Corrupted at the embedding, and put back at one place."""
    return run(f"{site}.{tokens}", NOISE, swap(site, [*tokens], "base"))


@pytest.mark.parametrize(
    ("site", "first"),
    [("attn.z", [1, 2]), ("resid_mid", [2, 3]), ("mlp.post", [2, 3]), ("mlp_out", [2, 3]), ("resid_post", [2, 3])],
)
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_corruption_runs_once_whatever_is_restored_behind_it(site: str, first: list[int], batch_size: int) -> None:
    """Every restored row passes through the blocks from its restoration on, and no others."""
    world = world_of(TIMM_POOLED, 3)
    documents = [restored(f"blocks.{layer}.{site}", token) for layer in (1, 2) for token in (1, 4, 9)]
    clean = [3, 3, 3]
    own = [sum(9 for since in first if since <= block) for block in range(3)]
    found = rows(world, run("corrupt", NOISE), *documents, batch_size=batch_size)
    assert found == [c + 3 + o for c, o in zip(clean, own, strict=True)]
    # Nobody has to declare what they begin with: one of the rows goes as far as any does, and the others go on from it.
    begun = [3 if block < max(first) else 0 for block in range(3)]
    assert rows(world, *documents, batch_size=batch_size) == [c + b + o for c, b, o in zip(clean, begun, own, strict=True)]


def test_going_on_may_be_written_as_reading_another_run() -> None:
    """As edits of every run, or as a run whose stream the others take: the same blocks run."""
    world = world_of(TIMM_PLAIN, 3)
    places = [(f"{layer}.{token}", swap(f"blocks.{layer}.resid_post", [token], "base")) for layer in (0, 1) for token in (1, 2)]
    alone = [run("corrupt", NOISE), *(run(name, NOISE, back) for name, back in places)]
    reading = [run(name, swap(back["site"], source={"run": "corrupt"}), back) for name, back in places]
    assert rows(world, *alone) == rows(world, alone[0], *reading) == [6, 12, 15]


@pytest.mark.parametrize(
    ("layer", "together", "alone"), [(0, [6, 3, 6], [6, 3, 3]), (1, [6, 6, 6], [6, 6, 3]), (2, [6, 6, 6], [3, 3, 3])]
)
def test_what_begins_as_a_row_that_is_looked_into_is_not_made_later(layer: int, together: list[int], alone: list[int]) -> None:
    """An edit that could be made behind its block is made inside, where another row is that makes the same there."""
    world = world_of(TIMM_PLAIN, 3)
    first = swap(f"blocks.{layer}.resid_mid", ["cls", 3])
    seen = run("seen", first, capture=(f"blocks.{layer}.mlp.post",))
    goes_on = run("goes on", first, push("ln_final" if layer == 2 else "blocks.2.resid_pre", ["cls"]))
    assert rows(world, seen, goes_on) == together
    assert rows(world, goes_on) == alone


def test_in_the_last_block_rows_of_another_stage_are_not_waited_for() -> None:
    world = world_of(TIMM_POOLED, 3)
    first = swap(f"{LAST}.resid_mid", [3])
    seen = run("seen", first, capture=(f"{LAST}.mlp.post",))
    read = run("read", push("embed", [2]))
    reading = run("reading", first, {"op": "inject_subspace", "site": "pooled", "source": {"run": "read"}, "basis": "basis.24"})
    clean = run("clean")
    assert rows(world, clean, seen, read, reading) == rows(world, clean, seen, read) == [9, 9, 12]


def test_cumulative_interventions_cost_one_suffix_each() -> None:
    world = world_of(TIMM_POOLED, 3)
    steps = [swap(f"blocks.{layer}.attn_out", [3, 5]) for layer in range(3)]
    documents = [run(f"first {n}", *steps[:n]) for n in (1, 2, 3)]
    # Source images pass through three blocks, and each run through the blocks behind its last edit.
    assert rows(world, *documents) == [3 + 3, 3 + 6, 3 + 9]
    assert rows(world, *reversed(documents)) == [3 + 3, 3 + 6, 3 + 9]


def test_pairs_of_heads_share_the_first_head() -> None:
    world = world_of(TIMM_POOLED, 3)
    silent = {"op": "ablate", "tokens": "all"}
    heads = [{**silent, "site": f"blocks.{layer}.attn.z", "heads": [head]} for layer in range(3) for head in range(2)]
    pairs = [(a, b) for a in range(6) for b in range(a + 1, 6)]
    documents = [run(f"{a}.{b}", heads[a], heads[b]) for a, b in pairs]
    states = set()
    for pair in pairs:
        for block in range(pair[0] // 2, 3):
            states.add((tuple(head for head in pair if head // 2 <= block), block))
    found = rows(world, *documents)
    clean = [3, 3, 0]
    assert found == [sum(3 for state in states if state[1] == block) + clean[block] for block in range(3)]


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_DINOV2, TIMM_POOLED], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("batch_size", [2, 7, 40])
def test_what_is_captured_is_each_runs_own(tiny: Tiny, batch_size: int) -> None:
    """Before they part, where they part, and behind that; of copies too, and for other runs that read them."""
    world = world_of(tiny, 3)
    every = ["embed", *(f"blocks.{layer}.{site}" for layer in range(3) for site in ("attn.z", "resid_mid", "mlp_out", "resid_post"))]
    noise = push("blocks.0.resid_post", "patches", 3.0)
    middle = swap("blocks.1.resid_mid", [2, 3], "base")
    ends = [
        swap("blocks.1.mlp_out", [5], "base"), swap("blocks.1.mlp_out", [6], "base"), swap("blocks.1.resid_post", [6]),
        swap("blocks.2.attn.z", [1, 2]), swap("blocks.2.mlp_out", [7], "base"), push("blocks.2.resid_post", "all", 2.0),
    ]  # fmt: skip
    documents = [run(f"{n}", noise, middle, end, capture=every) for n, end in enumerate(ends)]
    documents += [run("2 again", noise, middle, ends[2], capture=every), run("noise", noise, capture=every[3:7])]
    documents.append(run("reader", swap("blocks.2.resid_post", "all", {"run": "3"}, source_site="blocks.1.resid_post")))
    documents.append(run("on", noise, swap("blocks.1.attn_out", [4], {"run": "reader"}), capture=every))
    found = [Run.model_validate(document) for document in documents]
    named = world.named(documents)
    plan = vmi.plan(world.vit, found, world.columns, tensors=named, batch_size=batch_size)
    assert "others go on from these" in str(plan)
    with Counted(world.module) as count:
        results = world.execute(documents, batch_size=batch_size)
    assert (count.total, count.launches) == (plan.block_evaluations, plan.launches)
    world.check(documents, results, effect=None)
    memory = world.memory(documents, 2, batch_size)
    world.check(documents, world.execute(documents, batch_size=batch_size, memory=memory), effect=None)
    with ActivationStore() as store:
        world.check(documents, world.execute(documents, batch_size=batch_size, store=store), effect=None)


def test_rows_of_other_examples_and_columns_begin_alike_too() -> None:
    """An image that occurs again, with the same beginning and another end."""
    world = World(TIMM_POOLED, 4)
    world.columns["base"][2] = world.columns["base"][0]
    world.columns["source"][1] = world.columns["base"][0]
    world.columns["one"] = torch.tensor([[1], [2], [3], [4]])
    world.vit.sites()
    begin = push("embed", [2], 3.0)
    documents = [run("a", begin, push("blocks.1.resid_post", {"column": "one"})), run("b", begin, base="source")]
    # Seven images of eight places differ; a's rows differ in the last block alone.
    images = len({x.numpy().tobytes() for column in ("base", "source") for x in world.columns[column]})
    begun = len({x.numpy().tobytes() for x in world.columns["base"]} | {x.numpy().tobytes() for x in world.columns["source"]})
    assert images == begun == 6
    found = rows(world, *documents)
    distinct_b = len({x.numpy().tobytes() for x in world.columns["source"]})
    assert found[:2] == [begun, begun]
    assert found[2] == 4 + distinct_b


def test_rows_that_an_edit_does_nothing_to_are_those_that_begin_without_it() -> None:
    """The fifth example is its own source, so a swap before the rest changes nothing there."""
    world = repeating()
    behind = push("blocks.1.resid_post", ["cls", 3], 2.0)
    documents = [
        run("swap", swap("blocks.0.resid_post", ["cls", 2]), behind),
        run("plain", behind),
        run("more", swap("blocks.0.resid_post", ["cls", 2]), behind, swap("blocks.2.attn.v", [4])),
    ]
    found = rows(world, *documents)
    # Rows: "swap" and "more" are one up to the last block in the pairs of images that differ, and "plain" where they do not.
    base, source = ([x.numpy().tobytes() for x in world.columns[column]] for column in ("base", "source"))
    pairs = set(zip(base, source, strict=True))
    swapped = {pair for pair in pairs if pair[0] != pair[1]}
    assert len(swapped) < len(pairs) < 6
    sources, bases = {source for _, source in pairs}, set(base)
    assert found[0] == len(bases | sources)
    assert found[1] == len(bases | sources) + len(swapped)
    assert found[2] == len(sources) + len(bases) + len(swapped) + len(pairs)


def test_hooks_of_others_act_on_rows_that_begin_behind_them() -> None:
    """Somebody's own hook scales a block's output, so a row that edits the block's increment passes through all of it."""
    world = World(TIMM_POOLED, 2)
    world.vit.sites()

    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 1.5

    world.module.blocks[1].register_forward_hook(scale)
    documents = [run("corrupt", NOISE), *(restored(f"blocks.{place}", 3) for place in ("1.mlp_out", "1.resid_post", "2.attn.z"))]
    together = world.execute(documents, batch_size=5)
    corrupted = world.execute([{**document, "interventions": []} for document in documents[:1]])
    for document in documents:
        alone = world.execute([document])[document["name"]]
        assert torch.allclose(together[document["name"]], alone, atol=1e-5 * world.scale)
        assert float((alone - corrupted["corrupt"]).abs().amax(1).min()) > 1e-3
    plan = vmi.plan(world.vit, [Run.model_validate(document) for document in documents], world.columns)
    assert [rows.blocks for rows in plan.rows] == [3, 2, 1, 1]


def test_hooks_behind_the_middle_of_a_block_are_kept_in_the_way() -> None:
    """Somebody's own hook on the second norm acts on what is made of the middle, and not on the middle: a row that edits the
    middle or the increment passes through the whole block."""
    world = World(TIMM_PLAIN, 3)
    world.module.blocks[1].norm2.register_forward_pre_hook(lambda module, args: (1.3 * args[0] + 0.1,))
    noise = push("embed", [3], 3.0)
    documents = [
        run("clean"),
        run("corrupt", noise),
        run("inside", swap("blocks.1.mlp.post", [2])),
        run("increment", swap("blocks.1.mlp_out", [2])),
        run("restored", noise, swap("blocks.1.mlp_out", [2], "base")),
    ]
    results = world.execute([*documents, run("middle", swap("blocks.1.resid_mid", [2]))])
    world.check(documents, results, effect=None)
    site, place = "blocks.1.resid_mid", 3  # behind CLS
    with torch.no_grad():
        source = world.vit.run(world.columns["source"], capture=[site])[1][site]

        def put_in(h: Tensor) -> None:
            h[:, place] = source[:, place]

        with world.vit.hooks({site: put_in}):
            wanted = world.vit(world.columns["base"])
    assert torch.allclose(results["middle"], wanted, atol=1e-5 * world.scale)
    assert not torch.allclose(wanted, results["clean"], atol=1e-3)


def test_blank_rows_of_different_images_begin_alike() -> None:
    """A stream of zeros is the same for all, and where rows part differs by chunk."""
    world = World(TIMM_POOLED, 4)
    world.columns["kind"] = torch.tensor([0, 0, 1, 2])
    zeros = {"op": "ablate", "site": "blocks.0.resid_post", "tokens": "all"}
    kinds = {**push("blocks.1.resid_pre", [2]), "vector": "kinds.24", "choose": {"column": "kind"}}
    documents = [run("a", zeros, kinds, swap("blocks.2.attn.z", [1]))]
    runs = [Run.model_validate(document) for document in documents]
    world.vit.sites()
    options = {"batch_size": 2, "memory": world.memory(documents, 2, 2)}
    plan = vmi.plan(world.vit, runs, world.columns, tensors=world.named(documents), **options)
    assert plan.chunk == 2
    with Counted(world.module) as count:
        results = world.execute(documents, **options)
    assert (count.total, count.launches) == (plan.block_evaluations, plan.launches)
    world.check(documents, results)


def test_rows_of_one_run_may_begin_in_different_places() -> None:
    """Of three equal images one row passes through the block, and the others go on from it; the plan lists both."""
    world = World(TIMM_POOLED, 3)
    world.columns["base"][1:] = world.columns["base"][0]
    world.columns["one"] = torch.tensor([[1], [2], [3]])
    begin, end = push("blocks.0.resid_pre", [2], 3.0), push("blocks.1.resid_post", {"column": "one"}, 2.0)
    documents = [run("r", begin, end)]
    assert rows(world, *documents) == [1, 1, 3]
    plan = vmi.plan(world.vit, Run.model_validate(documents[0]), world.columns)
    assert [(own.examples, own.blocks) for own in plan.rows] == [(1, 3), (2, 1)]
    # What is handed on is held, and counted: one stream of floats per example, and an eighth for what is free between.
    schedule = world.schedule(documents, 3, 4)
    assert schedule.states_handed_on == 1
    held, without = footprint(world.vit, schedule), footprint(world.vit, schedule, 0)
    assert held.example - without.example == 4 * math.prod(world.shape("embed")) * 9 // 8


def test_what_rows_hand_on_is_reckoned_in_chunks_of_any_size() -> None:
    """All images are equal, so that the first row of every chunk hands states on, and more of them in later chunks."""
    world = World(TIMM_POOLED, 4)
    world.columns["base"][1:] = world.columns["base"][0].clone()
    documents = []
    for n in range(4):
        column = world.tiny.images(4, 50 + n)
        column[:n] = world.columns["base"][0]
        column[n:] = column[3].clone()
        world.columns[f"s{n}"] = column
        begin = swap("blocks.0.resid_pre", [1], f"s{n}")
        documents += [run(f"{n}.{token}", begin, swap("blocks.2.resid_pre", [token])) for token in (2, 3)]
    for chunk in (1, 2, 4):
        schedule = world.schedule(documents, chunk, 3)
        assert schedule.chunk == chunk
        states = [schedule.rows.of(own).branches.n_states for own in schedule.chunks]
        assert max(states) > 0
        assert all(own <= schedule.states_handed_on * chunk for own in states)


def test_a_run_that_is_another_one_from_a_place_on_keeps_its_name() -> None:
    """And what is captured of it before is its own base's."""
    world = world_of(TIMM_PLAIN, 3)
    noise = push("embed", "patches", 3.0)
    documents = [
        run("c", noise, swap("blocks.1.attn.z", ["cls", 1])),
        run("a", noise, swap("blocks.1.attn.z", ["cls", 2])),
        *(run(name, swap("blocks.1.resid_post", "all", {"run": "a"}), capture=("blocks.0.resid_post", "blocks.1.resid_post")) for name in "bd"),
    ]  # fmt: skip
    plan = vmi.plan(world.vit, [Run.model_validate(document) for document in documents], world.columns)
    assert [own.run for own in plan.rows] == ["c", "a", "b", "d"]
    world.check(documents, world.execute(documents), effect=None)


def test_the_last_block_is_shared_within_a_stage_alone() -> None:
    """One stage leaves out tokens there that another one captures."""
    world = world_of(TIMM_PLAIN, 3)
    last = ("blocks.2.resid_mid", "blocks.2.mlp_out", "blocks.2.resid_post")
    documents = [
        run("a", NOISE, push("blocks.2.resid_post", ["cls"])),
        run("c", push("blocks.0.resid_pre", [5], 2.0)),
        run("b", NOISE, swap("blocks.2.mlp_out", ["cls"], {"run": "c"}), capture=last),
    ]
    world.check(documents, world.execute(documents))


def test_blank_rows_are_not_those_that_keep_their_base() -> None:
    """A stream of which all that is read is replaced is told from one that somebody captures more of."""
    world = world_of(TIMM_PLAIN, 3)
    zeros = {"op": "ablate", "site": "blocks.2.resid_mid", "tokens": ["cls"]}
    documents = [run("a", zeros), run("b", zeros, capture=("blocks.2.mlp_out", "blocks.2.resid_post"))]
    world.check(documents, world.execute(documents))


def test_runs_that_read_what_is_still_the_same_are_the_same() -> None:
    """Two runs part behind the place where they are read."""
    world = world_of(TIMM_POOLED, 3)
    senders = [run(name, NOISE, swap("blocks.1.resid_post", [token])) for name, token in (("a", 2), ("b", 5))]
    readers = [run(f"reads {name}", swap("blocks.0.resid_post", [1], {"run": name})) for name in "ab"]
    assert rows(world, *senders, *readers) == rows(world, *senders, readers[0])
    later = [run(f"reads {name}", swap("blocks.1.resid_post", [2], {"run": name})) for name in "ab"]
    assert sum(rows(world, *senders, *later)) > sum(rows(world, *senders, later[0]))


def test_the_plan_says_what_goes_on_from_what() -> None:
    world = world_of(TIMM_PLAIN, 3)
    documents = [run("corrupt", NOISE), *(restored(f"blocks.1.{site}", "cls", 2) for site in ("resid_post", "attn.z"))]
    plan = vmi.plan(world.vit, [Run.model_validate(document) for document in documents], world.columns)
    assert [(r.joins, r.blocks) for r in plan.rows] == [
        ("the input of block 0", 3),
        ("the output of block 1, from rows that have its first edit", 1),
        ("the output of block 0, from rows that have its first edit", 2),
    ]
    note = "rows that begin with the same interventions on the same images as others go on from these: 6 in all, which spares 9 block"
    assert note in str(plan)
    assert "others go on from" not in str(vmi.plan(world.vit, Run.model_validate(documents[1]), world.columns))
