"""Columns all of whose images another one holds: a store computes these once, and each example still has its own tokens."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vit_mechinterp as vmi
from tests.engine.experiments import assert_same_bits, cut_small
from tests.engine.stopped import stopped
from tests.engine.stores import blocks_of, captured
from tests.engine.test_store_repeats import COLUMN, DOCUMENTS, SITE, close, repeating
from tests.engine.world import Counted, World
from vit_mechinterp import ActivationStore, Run
from vit_mechinterp.engine import prepare
from vit_mechinterp.engine.store import source

COLUMNS = {
    "in another order": ([3, 0, 1, 4, 2, 5, 6, 6], [0, 1, 2, 3, 4, 5, 6, 3], 7),
    "some of the base's": ([3, 0, 1, 4, 2, 5, 6, 3], [4, 4, 5, 0, 5, 4, 0, 5], 7),
}
"""Images of bases and of sources, and how many there are in all."""
APART = {
    "neither holds the other": ([3, 0, 1, 4, 2, 5, 3, 3], [4, 6, 5, 0, 1, 2, 0, 4]),
    "what is read of bases is not kept of sources": ([4, 4, 5, 0, 5, 4, 0, 5], [3, 0, 1, 4, 2, 5, 6, 3]),
    "each has the other's": ([3, 0, 1, 4, 2, 5, 6, 6], [0, 1, 2, 3, 4, 6, 5, 3]),
}
"""Images of bases and of sources; no example is its own source."""


def swap(site: str = SITE, tokens: Any = (0, 4)) -> dict[str, Any]:
    tokens = list(tokens) if isinstance(tokens, tuple) else tokens
    return {"name": "swap", "interventions": [{"op": "interchange", "site": site, "source": "source", "tokens": tokens}]}


def planned(world: World, documents: list[dict[str, Any]], store: ActivationStore, **options: Any) -> vmi.Plan:
    runs = [Run.model_validate(document) for document in documents]
    return vmi.plan(world.vit, runs, world.columns, tensors=world.named(documents), store=store, **options)


@pytest.mark.parametrize("chunks", ["one", "many"])
@pytest.mark.parametrize("host", ["1GiB", "300KiB"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_an_experiment_computes_every_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str, host: str, chunks: str
) -> None:
    base, other, n_images = COLUMNS[columns]
    world = repeating(base, other)
    blocks_of(monkeypatch, 3_000)
    if chunks == "many":
        cut_small(monkeypatch)
    results = []
    for clean in (n_images, 0):
        with ActivationStore(tmp_path, host=host) as store:
            plan = planned(world, DOCUMENTS, store, batch_size=4)
            with Counted(world.module) as counted:
                results.append(world.execute(DOCUMENTS, batch_size=4, store=store))
        # Every run starts behind block 1, so whatever passes through block 0 is a clean forward.
        assert counted.rows[0] == clean
        assert (counted.total, counted.launches) == (plan.block_evaluations, plan.launches)
        assert len({own.column for own in plan.clean}) == (1 if clean else 0)
        assert not any("once for each column" in note for note in plan.notes)
    assert_same_bits(*results)
    world.check(DOCUMENTS, results[0], effect=None)


def test_in_one_chunk_nothing_has_to_be_held_for_that() -> None:
    base, other, n_images = COLUMNS["in another order"]
    world = repeating(base, other)
    with ActivationStore(host="1KiB") as store:
        plan = planned(world, [swap()], store)
        with Counted(world.module) as counted:
            results = world.execute([swap()], store=store)
    assert counted.rows[0] == n_images
    assert counted.total == plan.block_evaluations
    world.check([swap()], results, effect=None)


def test_a_plan_lists_what_is_kept_for_both_columns() -> None:
    world = repeating(*COLUMNS["in another order"][:2])
    documents = [swap("blocks.1.mlp_out"), {"name": "clean"}]
    with ActivationStore() as store:
        (forwards,) = planned(world, documents, store).clean
    assert (forwards.column, forwards.images, forwards.blocks) == ("base", 7, 3)
    assert {"blocks.1.mlp_out", "logits"} < set(forwards.kept)


@pytest.mark.parametrize(
    ("columns", "document"),
    [
        ("neither holds the other", swap()),
        ("what is read of bases is not kept of sources", swap()),
        ("each has the other's", swap("blocks.1.mlp.post", COLUMN)),
    ],
)
def test_other_columns_stay_apart(columns: str, document: dict[str, Any]) -> None:
    base, other = APART[columns]
    world, images = repeating(base, other), len({*base} & {*other})
    note = (
        f"{images} images pass through the model once for each column that they stand in, because a store computes a "
        "column in batches of its own, unless another one holds all of its images, and all that is read of them"
    )
    with ActivationStore() as store:
        assert note in planned(world, [document], store).notes
        with Counted(world.module) as counted:
            results = world.execute([document], store=store)
    assert counted.rows[0] == len({*base}) + len({*other})
    world.check([document], results)


def test_what_is_stored_under_its_own_name_is_read() -> None:
    world = repeating(*APART["each has the other's"])
    with ActivationStore() as store:
        captured(store, world, SITE, column="source", tokens=[0, 4])
        captured(store, world, SITE)
        with Counted(world.module) as counted:
            results = world.execute([swap()], store=store)
        assert counted.rows[0] == 0
        world.check([swap()], results)
        # Of a column that is stored under another name nothing is there under its own.
        captured(store, world, "blocks.0.resid_post", column="source")
        assert planned(world, [swap("blocks.0.resid_post")], store).clean[0].column == "base"


def kept_apart(results: vmi.Results) -> dict[str, int]:
    """Images per clean forward, of every column that is kept by itself."""
    rows: dict[str, int] = results.provenance["images_per_stored_forward"]
    return rows


def test_an_experiment_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what the store has by then would be read with fewer forwards if columns were apart."""
    world = repeating(*APART["each has the other's"])
    cut_small(monkeypatch)
    edit = {"op": "interchange", "site": "blocks.0.resid_post", "source": "source", "source_site": "blocks.2.resid_post"}
    tokens = ("cls", "patches", ["cls", 4], ["cls", 1, 7])
    documents = [{"name": f"{n}", "interventions": [edit | {"tokens": own}]} for n, own in enumerate(tokens)]
    whole = world.execute(documents, batch_size=3, out=tmp_path / "whole", store=ActivationStore())
    with ActivationStore() as store:
        stopped(world, tmp_path / "out", 1, monkeypatch, documents, batch_size=3, store=store)
    with ActivationStore() as store:
        rows = kept_apart(whole)
        captured(store, world, "blocks.2.resid_post", column="source", batch_size=rows["base"])
        apart = planned(world, documents, store, batch_size=3)
        assert [(own.column, own.blocks) for own in apart.clean] == [("base", 1)]
        results = world.execute(documents, batch_size=3, out=tmp_path / "out", store=store)
        assert_same_bits(results, whole)
        assert list(kept_apart(results)) == list(rows) == ["base"]


@pytest.mark.parametrize("streamed", [False, True], ids=["held", "streamed"])
def test_trainings_compute_every_image_once(tmp_path: Path, streamed: bool) -> None:
    base, other, images = COLUMNS["some of the base's"]
    world = repeating(base, other)
    edit = {"op": "inject_subspace", "site": SITE, "basis": "R", "source": "source", "tokens": COLUMN}
    runs = [Run.model_validate({"name": "das", "interventions": [edit]})]
    basis = torch.linalg.qr(torch.randn(24, 2, generator=torch.Generator().manual_seed(0))).Q.requires_grad_()
    budget = world.one_row(runs, {"R": basis}) if streamed else None
    outputs = []
    for store in (None, ActivationStore(tmp_path)):
        options: dict[str, Any] = {"store": store, "memory": budget, "batch_size": 3, "progress": False}
        with prepare(world.vit, runs, world.columns, {"R": basis}, **options) as prepared:
            assert prepared.clean_evaluations == 2 * images  # of two blocks
            outputs.append(prepared([6, 0, 2, 7, 3], {"R": basis}))
    close(outputs[0], outputs[1])


@given(st.lists(st.integers(0, 4), min_size=1).map(sorted), st.integers(1, 6))
def test_whole_activations_are_read_batch_by_batch(batches: list[int], few: int) -> None:
    spans = [batches[span] for span in source._spans(np.array(batches), few)]
    assert [*chain.from_iterable(spans)] == batches
    for own, after in pairwise(spans):
        assert len(own) >= few
        assert own[-1] < after[0]
    assert all(len(own) < few or own[0] == own[-1] or own.index(own[-1]) < few for own in spans)


def test_of_chosen_tokens_few_whole_activations_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    world = repeating(range(7), range(7))
    blocks_of(monkeypatch, 1)
    taken: list[int] = []
    original = source.Source.take

    def take(self: Any, wanted: Any) -> Any:
        taken.extend(len(places) for form, places in wanted.items() if form is not None and form.positions.is_all)
        return original(self, wanted)

    monkeypatch.setattr(source.Source, "take", take)
    ablation = {"op": "ablate", "site": "blocks.1.mlp.post", "method": "resample", "tokens": COLUMN, "seed": 1}
    documents = [{"name": "resampled", "interventions": [ablation]}]
    with ActivationStore() as store, Counted(world.module) as counted:
        results = world.execute(documents, batch_size=2, store=store)
    assert max(own for own in taken if own < 7) <= 2
    assert counted.rows[0] == 7
    world.check(documents, results)
