"""What is captured before the first edit, in the block that rows join at, is read off the rows that pass it."""

from __future__ import annotations

from typing import Any

import pytest

import vit_mechinterp as vmi
from tests.engine.world import Counted, World
from tests.tiny_models import HF_CLIP, HF_VIT, TIMM_PLAIN, Tiny
from vit_mechinterp import Run

Document = dict[str, Any]

HEAD = {"op": "ablate", "site": "blocks.1.attn.z", "heads": [0]}
MIDDLE = {"op": "ablate", "site": "blocks.1.mlp.post", "tokens": [1]}
LAST = {"op": "ablate", "site": "blocks.2.mlp.post", "tokens": "cls"}


def counted(world: World, documents: list[Document], **options: Any) -> int:
    """(row, block) pairs that run, after a check of the results and of the plan."""
    runs = [Run.model_validate(document) for document in documents]
    world.vit.sites()
    plan = vmi.plan(world.vit, runs, world.columns, **options)
    with Counted(world.module) as count:
        results = world.execute(documents, **options)
    world.check(documents, results)
    assert count.total == plan.block_evaluations
    return count.total


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_VIT, HF_CLIP], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize(
    ("edit", "captured"),
    [(HEAD, ("blocks.1.ln1", "blocks.1.attn.q")), (MIDDLE, ("blocks.1.attn.pattern", "blocks.1.resid_mid", "blocks.1.ln2"))],
)
def test_one_run_costs_no_more_than_by_itself(tiny: Tiny, edit: Document, captured: tuple[str, ...]) -> None:
    world = World(tiny, 2)
    alone = {"name": "r", "interventions": [edit], "capture": captured}
    assert counted(world, [alone]) == 2 * 3


def test_rows_that_others_go_on_from_show_it_for_them() -> None:
    """An equal run, and one that goes on from the same first edit, each with captures of its own."""
    world = World(TIMM_PLAIN, 3)
    documents = [
        {"name": "a", "interventions": [HEAD]},
        {"name": "equal", "interventions": [HEAD], "capture": ["blocks.1.ln1", "blocks.1.attn_out"]},
        {"name": "on", "interventions": [HEAD, LAST], "capture": ["blocks.1.attn.v", "blocks.0.ln2", "blocks.2.ln2"]},
    ]
    # One block of the images, two of the rows, and the last one again for those that part there.
    assert counted(world, documents) == 3 * (1 + 2 + 1)
    assert counted(world, documents[::-1], batch_size=2) == 3 * (1 + 2 + 1)


def test_an_image_that_passes_anyway_shows_it() -> None:
    world = World(TIMM_PLAIN, 2)
    late = {"name": "late", "interventions": [MIDDLE], "capture": ["blocks.1.ln1"]}
    assert counted(world, [{"name": "clean"}, late]) == 2 * (3 + 2)


def test_equal_rows_of_two_bases_show_it_alike() -> None:
    """Of the first base a clean forward passes the block, of the second none; one of the equal rows is computed."""
    world = World(TIMM_PLAIN, 2)
    world.columns["other"] = world.columns["base"].clone()
    late = {"interventions": [MIDDLE], "capture": ["blocks.1.ln1", "blocks.1.resid_mid"]}
    for bases in (("base", "other"), ("other", "base")):
        documents = [
            {"name": "clean", "base": bases[0]},
            {"name": "a", "base": bases[0], **late},
            {"name": "b", "base": bases[1], **late},
        ]
        assert counted(world, documents) == 2 * (3 + 2)


def test_examples_that_are_first_edited_later() -> None:
    """Where the first edit puts back what is there, the second is the first: what lies before it is clean."""
    world = World(TIMM_PLAIN, 3)
    world.columns["source"][1] = world.columns["base"][1]
    first = {"op": "interchange", "site": "blocks.1.attn.q", "source": "source", "tokens": [1, 3]}
    for later in ({"op": "ablate", "site": "blocks.1.ln2", "tokens": [1]}, LAST):
        captured = ["blocks.1.attn.q", "blocks.1.ln1", "blocks.1.attn.z", "blocks.2.ln1", "blocks.2.ln2"]
        document = {"name": "r", "interventions": [first, later], "capture": captured}
        counted(world, [document])
        counted(world, [document, {"name": "clean"}], batch_size=1)


@pytest.mark.parametrize("idle", ["blocks.1.ln1", "blocks.0.resid_post"])
@pytest.mark.parametrize("clean", [False, True], ids=["read off rows", "given by images"])
def test_rows_that_turn_out_to_be_those_of_a_run_that_lacks_an_edit(idle: str, clean: bool) -> None:
    """Both show it alike, though the one starts inside the block by its declaration, and the other before it."""
    world = World(TIMM_PLAIN, 2)
    world.columns["other"] = world.columns["base"].clone()
    nothing = {"op": "interchange", "site": idle, "source": "other", "tokens": [1, 3]}
    documents: list[Document] = [
        {"name": "without", "interventions": [MIDDLE]},
        {"name": "with", "interventions": [nothing, MIDDLE], "capture": ["blocks.1.ln2", "blocks.1.mlp_out"], "output": False},
    ]
    if clean:
        documents.append({"name": "clean", "capture": ["blocks.1.mlp.post"], "output": False})
    for own in (documents, documents[::-1]):
        assert counted(world, own) == 2 * (3 + clean)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("captured", [("attn.k",), ("attn.k", "mlp.post")])
@pytest.mark.parametrize("rows", [1, 20])
def test_rows_that_hold_nothing_of_their_base_behind_it(layer: int, captured: tuple[str, ...], rows: int) -> None:
    """They start from it even so: no image passes the block for what they have shown before it is replaced."""
    world = World(TIMM_PLAIN, 3)
    zeros = {"op": "ablate", "site": f"blocks.{layer}.resid_mid"}
    document = {"name": "r", "interventions": [zeros], "capture": [f"blocks.{layer}.{site}" for site in captured]}
    memory = world.memory([document], 1, rows)
    assert counted(world, [document], batch_size=rows) == 3 * 3
    assert counted(world, [document], batch_size=rows, memory=memory) == 3 * 3
    assert counted(world, [document, {"name": "equal", "interventions": [zeros]}], batch_size=rows) == 3 * 3


@pytest.mark.parametrize(
    ("edits", "again"),
    [
        ([MIDDLE], [MIDDLE, {"op": "add_direction", "site": "blocks.2.resid_mid", "vector": "direction.24", "alpha": 0.0}]),
        ([MIDDLE | {"tokens": [1, 4]}], [MIDDLE | {"tokens": [4, 1]}]),
        ([HEAD | {"tokens": [1, 4]}], [HEAD | {"tokens": [4]}, HEAD | {"tokens": [1]}]),
    ],
    ids=["with nothing added", "in another order", "one after the other"],
)
def test_runs_that_are_equal_in_other_words(edits: list[Document], again: list[Document]) -> None:
    world = World(TIMM_PLAIN, 2)
    documents = [
        {"name": "a", "interventions": edits},
        {"name": "b", "interventions": again, "capture": ["blocks.1.ln1"], "output": False},
    ]
    for own in (documents, documents[::-1]):
        assert counted(world, own, tensors=world.named(own)) == 2 * 3


@pytest.mark.parametrize("stored", [False, True])
def test_in_chunks_and_with_a_store(stored: bool, tmp_path: Any) -> None:
    world = World(TIMM_PLAIN, 3)
    documents = [
        {"name": "a", "interventions": [HEAD], "capture": ["blocks.1.ln1"]},
        {"name": "b", "interventions": [HEAD, LAST], "capture": ["blocks.1.attn.k"], "output": False},
        {"name": "c", "interventions": [MIDDLE], "capture": ["blocks.1.ln1", "blocks.1.mlp.pre"]},
    ]
    options: dict[str, Any] = {"store": vmi.ActivationStore(tmp_path)} if stored else {}
    memory = world.memory(documents, 2, 2, stored=stored)
    for _ in range(2):
        results = world.execute(documents, batch_size=2, memory=memory, **options)
        world.check(documents, results)
