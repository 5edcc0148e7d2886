"""No (row, block) pair is computed that need not be: a count that knows nothing of the engine gives the same number."""

from __future__ import annotations

import random
from typing import Any

import pytest

import vit_mechinterp as vmi
from tests.engine.test_sharing import repeating
from tests.engine.world import Counted, World
from tests.tiny_models import N_LAYERS
from vit_mechinterp import Run

Document = dict[str, Any]

SITES = ("resid_pre", "attn.q", "attn.z", "resid_mid", "mlp.post", "mlp_out", "resid_post")
BEHIND = ("mlp_out", "resid_post")
"""Sites whose edits leave nothing of their block to be computed."""


def drawn(draw: random.Random, n_layers: int) -> list[Document]:
    """Runs of one to three interventions at random sites, some of them behind those of another run; some are equal, some do
    nothing."""
    documents: list[Document] = []
    for n in range(draw.randint(2, 7)):
        begun = draw.choice([[], [], *(document["interventions"] for document in documents)])
        edits: list[Document] = [*begun[:3]]
        for _ in range(draw.randint(1, 3)):
            site = f"blocks.{draw.randrange(n_layers)}.{draw.choice(SITES)}"
            source = draw.choice(["source", "source", "base"])
            edits.append({"op": "interchange", "site": site, "source": source, "tokens": draw.choice([[1], ["cls", 2]])})
        documents.append({"name": f"r{n}", "interventions": edits})
    return documents


def needed(world: World, documents: list[Document], n_layers: int) -> int:
    """Blocks of every distinct row behind its first edit that changes something, once for all rows of the same edits so
    far, and of every distinct image as far as a row starts from it or an edit reads it. The output reads CLS alone."""
    images = {
        (column, i): world.columns[column][i].numpy().tobytes()
        for column in ("base", "source")
        for i in range(len(world.columns["base"]))
    }
    rows: set[Any] = set()
    clean: dict[bytes, int] = {}

    def until(image: bytes, blocks: int) -> None:
        clean[image] = max(clean.get(image, 0), blocks)

    for document in documents:
        for i in range(len(world.columns["base"])):
            own = images["base", i]
            acting: list[tuple[int, int, str, bytes]] = []
            for edit in seen(document["interventions"], n_layers):
                given = images[edit["source"], i]
                if replaces_what_is_read(edit, n_layers):
                    own, acting = given, []
                    continue
                # An image's own value changes nothing unless something before it did.
                if given != own or acting:
                    acting.append((layer_of(edit), SITES.index(name_of(edit)), str(edit["tokens"]), given))
            if not acting:
                until(own, n_layers)
                continue
            layer, name = acting[0][0], SITES[acting[0][1]]
            until(own, first_block(layer, name))
            for at, place, _, given in acting:
                until(given, at if SITES[place] == "resid_pre" else at + 1)
            for block in range(first_block(layer, name), n_layers):
                made = [edit for edit in acting if first_block(edit[0], SITES[edit[1]]) <= block]
                rows.add((own, tuple(map(by_one_name, made)), block))
    return len(rows) + sum(clean.values())


def by_one_name(edit: tuple[int, int, str, bytes]) -> tuple[Any, ...]:
    """What enters a block is what the one before puts out."""
    layer, place, *rest = edit
    return (layer - 1, SITES.index("resid_post"), *rest) if SITES[place] == "resid_pre" and layer else edit


def first_block(layer: int, name: str) -> int:
    """The first block that has to run for an edit."""
    return layer + (name in BEHIND)


def seen(edits: list[Document], n_layers: int) -> list[Document]:
    """Edits in forward order, without those that CLS never hears of, and those that are written over at once. (The order
    of a list counts at one and the same site only.)"""
    found: list[Document] = []
    for edit in sorted(edits, key=lambda e: (layer_of(e), SITES.index(name_of(e)))):
        late = layer_of(edit) == n_layers - 1 and name_of(edit) != "resid_pre"
        found = [other for other in found if (other["site"], other["tokens"]) != (edit["site"], edit["tokens"])]
        if not (late and "cls" not in edit["tokens"]):
            found.append(edit)
    return found


def replaces_what_is_read(edit: Document, n_layers: int) -> bool:
    late = layer_of(edit) == n_layers - 1 and name_of(edit) in ("resid_mid", "resid_post")
    return late and "cls" in edit["tokens"]


def layer_of(edit: Document) -> int:
    return int(edit["site"].split(".")[1])


def name_of(edit: Document) -> str:
    return str(edit["site"].split(".", 2)[2])


@pytest.mark.parametrize("seed", range(12))
def test_no_pair_is_computed_that_need_not_be(seed: int) -> None:
    world = repeating()
    draw = random.Random(seed)
    documents = drawn(draw, N_LAYERS)
    floor = needed(world, documents, N_LAYERS)
    runs = [Run.model_validate(document) for document in documents]
    whole = vmi.plan(world.vit, runs, world.columns)
    assert whole.block_evaluations == floor < whole.naive_block_evaluations
    with Counted(world.module) as count:
        results = world.execute(documents)
    assert count.total == floor
    world.check(documents, results, effect=None)
    # In chunks what is computed more is said, and what is said is what is computed.
    memory = world.memory(documents, 2, 3)
    cut = vmi.plan(world.vit, runs, world.columns, batch_size=3, memory=memory)
    with Counted(world.module) as count:
        results = world.execute(documents, batch_size=3, memory=memory)
    world.check(documents, results, effect=None)
    assert count.total == cut.block_evaluations >= floor
    assert cut.chunk in (1, 2, 3)
    if cut.block_evaluations > floor:
        assert "images that occur in several chunks pass through the model" in str(cut)
