"""Columns that hold an image several times: a store computes it once, and gives every example its own values."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vit_mechinterp as vmi
from tests.engine.experiments import assert_same_bits, cut_small
from tests.engine.stores import blocks_of, captured
from tests.engine.world import Counted, World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import ActivationStore
from vit_mechinterp.engine import prepare
from vit_mechinterp.engine.binding.positions import Positions
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.inputs.images import image_numbers
from vit_mechinterp.engine.store import disk, source
from vit_mechinterp.engine.store.holdings import Holdings
from vit_mechinterp.engine.store.slots import slots_of
from vit_mechinterp.spec import Site, TokenBox, TokenColumn

BASE = [3, 0, 3, 1, 0, 4, 3, 2, 1, 3, 0, 2, 3]
"""The image of every example: five images, three of them among the first four examples."""
SOURCE = [5, 5, 6, 0, 5, 6, 6, 5, 0, 5, 6, 0, 5]
N, IMAGES, SOURCES = len(BASE), 5, 3
SITE = "blocks.1.resid_post"


def repeating(base: Sequence[int] = BASE, other: Sequence[int] = SOURCE) -> World:
    """A world whose image columns draw from seven images."""
    world = World(TIMM_PLAIN, len(base))
    images = TIMM_PLAIN.images(7, seed=5)
    world.columns.update(base=images[list(base)], source=images[list(other)[: len(base)]])
    world.vit.sites()  # takes a forward, once
    return world


@pytest.fixture(scope="module")
def world() -> World:
    return repeating()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few examples each, so that a tiny model fills many of them."""
    blocks_of(monkeypatch, 3_000)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("budgets", [{}, {"host": "30KiB"}, {"host": 0}, {"disk": 0}])
@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_every_image_passes_once(
    world: World, tmp_path: Path, budgets: dict[str, Any], batch_size: int, small_blocks: None
) -> None:
    sites = ["embed", SITE, "blocks.2.attn.pattern", "pooled", "logits"]
    expected = world.oracle.clean("base")[1]
    with ActivationStore(tmp_path, **budgets) as store:
        with Counted(world.module) as counted:
            view = captured(store, world, sites, batch_size=batch_size)
        assert counted.rows == [IMAGES] * 3
        for name, site in view.items():
            assert site.shape == expected[name].shape
            for index in (7, -1, slice(3, 9), [11, 0, 2, 2, 5], torch.tensor([12, 4]), torch.randperm(N)):
                close(site[index], expected[name][index])
            first = {image: BASE.index(image) for image in BASE}
            assert torch.equal(site[:], site[[first[image] for image in BASE]])
            rows = site[[first[image] for image in sorted(first)]].flatten(1)
            assert float(torch.pdist(rows).min()) > 1e-3
        assert view["logits"].nbytes == IMAGES * view["logits"][0].nbytes


@pytest.mark.parametrize(
    "tokens", [["cls", 2], TokenColumn(column="here"), TokenBox(box="box")], ids=["named", "column", "box"]
)
@pytest.mark.parametrize("whole", [False, True])
def test_tokens_are_each_examples_own(world: World, tmp_path: Path, tokens: Any, whole: bool, small_blocks: None) -> None:
    selector = tokens if isinstance(tokens, list) else tokens.model_dump()
    places = [world.oracle.positions(selector, i) for i in range(N)]
    assert isinstance(tokens, list) or places[0] != places[2]  # of one image
    values = world.oracle.clean("base")[1][SITE]
    with ActivationStore(tmp_path) as store:
        if whole:
            captured(store, world, SITE)
        with Counted(world.module) as counted:
            rows = captured(store, world, SITE, tokens=tokens)[SITE]
            for example in (6, 0, N - 1):
                close(rows[example], values[example, places[example]])
        assert counted.rows == ([0, 0, 0] if whole else [IMAGES, IMAGES, 0])
        for example, row in zip([9, 1, 9, 4], rows[[9, 1, 9, 4]], strict=True):
            close(row, values[example, places[example]])
    with ActivationStore(tmp_path) as again, Counted(world.module) as counted:
        other = captured(again, world, SITE, tokens=tokens)[SITE]
        assert all(torch.equal(a, b) for a, b in zip(rows[:], other[:], strict=True))
    assert counted.total == 0


@pytest.mark.parametrize("host", ["1GiB", 0])
@pytest.mark.parametrize("tokens", ["all", {"column": "here"}])
def test_what_was_lost_comes_back_to_the_same_bits(
    world: World, tmp_path: Path, host: Any, tokens: Any, small_blocks: None
) -> None:
    tokens = tokens if tokens == "all" else TokenColumn(**tokens)
    options: dict[str, Any] = {"sites": SITE, "tokens": tokens, "batch_size": 2}
    with ActivationStore(tmp_path) as store:
        before = captured(store, world, **options)[SITE][:]
    paths = sorted(tmp_path.rglob("*.safetensors"))
    assert len(paths) > 1
    paths[1].write_bytes(paths[1].read_bytes()[:-9])
    order = [12, 3, 8, 0, 5, 1, 4, 2, 7, 9, 6, 11, 10]
    with ActivationStore(tmp_path, host=host) as store, Counted(world.module) as counted:
        again = captured(store, world, **options)[SITE][order]
        assert torch.equal(again, before[order])
    assert 0 < counted.rows[0] < IMAGES


COLUMN = {"column": "here"}
DOCUMENTS: list[dict[str, Any]] = [
    {"name": "clean", "capture": [SITE]},
    {
        "name": "swap",
        "interventions": [
            {
                "op": "interchange",
                "site": SITE,
                "source": "source",
                "tokens": COLUMN,
                "source_tokens": {"column": "there"},
            }
        ],
        "capture": ["pooled", "blocks.2.resid_mid"],
    },
    {"name": "named", "interventions": [{"op": "interchange", "site": SITE, "source": "source", "tokens": ["cls", 3]}]},
    *(
        {"name": f"mean {n}", "interventions": [{"op": "ablate", "site": SITE, "method": "mean", **fields}]}
        for n, fields in enumerate(
            (
                {"tokens": [0, 5]},
                {"tokens": ["cls", 2], "pool_tokens": True},
                {"tokens": COLUMN, "pool_tokens": True},
            )
        )
    ),
    *(
        {
            "name": f"resample {n}",
            "interventions": [{"op": "ablate", "site": SITE, "method": "resample", "tokens": tokens, "seed": n}],
        }
        for n, tokens in enumerate(("all", ["cls", 2], COLUMN))
    ),
]


@pytest.mark.parametrize("chunks", ["one", "many"])
@pytest.mark.parametrize("host", ["1GiB", "20KiB", 0])
def test_an_experiment_computes_every_image_of_a_column_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: str, host: Any, small_blocks: None
) -> None:
    if chunks == "many":
        cut_small(monkeypatch)
    original = disk.DiskTier.write

    def slowly(*args: Any) -> None:
        time.sleep(0.02)
        original(*args)

    monkeypatch.setattr(disk.DiskTier, "write", slowly)  # what waits to be written is read meanwhile
    results = []
    for clean in (IMAGES + SOURCES, 0):
        with ActivationStore(tmp_path, host=host) as store, Counted(world.module) as counted:
            results.append(world.execute(DOCUMENTS, batch_size=4, store=store))
        # Every run starts behind block 1, so whatever passes through block 0 is a clean forward.
        assert counted.rows[0] == clean
    assert_same_bits(*results)
    world.check(DOCUMENTS, results[0], effect=None)
    assert all(float((results[0].logits[0] - row).abs().max()) > 1e-3 for row in results[0].logits[1:])


MEANS_AND_MORE = [document for document in DOCUMENTS if "resample" not in document["name"]]
RESAMPLED: list[dict[str, Any]] = [
    {
        "name": "resampled",
        "interventions": [{"op": "ablate", "site": "blocks.1.mlp.post", "method": "resample", "seed": 3}],
        "capture": ["blocks.2.resid_mid"],
    },
    {"name": "clean"},
]


@pytest.mark.parametrize(
    ("documents", "host", "columns"),
    [
        pytest.param(MEANS_AND_MORE, 0, "both", id="means, on disk"),
        pytest.param(MEANS_AND_MORE, "1GiB", "both", id="means, in memory"),
        pytest.param(RESAMPLED, "1GiB", "base", id="resampled, in memory"),
    ],
)
def test_what_one_chunk_needs_of_an_image_and_what_others_need_takes_one_forward(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_blocks: None,
    documents: list[dict[str, Any]],
    host: Any,
    columns: str,
) -> None:
    world = World(TIMM_PLAIN, n=24)
    world.vit.sites()  # takes a forward, once
    cut_small(monkeypatch)
    folder = tmp_path if host == 0 else None
    with ActivationStore(folder, host=host) as store, Counted(world.module) as counted:
        results = world.execute(documents, batch_size=4, store=store)
    assert counted.rows[0] == world.n * (2 if columns == "both" else 1)  # edits begin behind block 0
    world.check(documents, results, effect=None)


def test_columns_with_the_same_images_share_what_is_theirs(tmp_path: Path) -> None:
    def computed(world: World, **options: Any) -> int:
        with ActivationStore(tmp_path) as store, Counted(world.module) as counted:
            rows = captured(store, world, SITE, **options)[SITE][2]
        places = world.oracle.positions(COLUMN if "tokens" in options else "all", 2)
        close(rows.float(), world.oracle.clean("base")[1][SITE][2, places])
        return counted.rows[0]

    once, column = repeating([3, 0, 1]), {"tokens": TokenColumn(column="here"), "dtype": torch.float64}
    assert computed(once) == 3
    assert computed(repeating([3, 3, 0, 1, 0])) == 0
    assert computed(repeating([3, 0, 0, 3, 1, 1, 1])) == 0
    assert computed(repeating([0, 3, 3, 1])) == 3  # in another order
    assert computed(repeating([3, 0, 1, 2])) == 4
    # Tokens that are chosen example by example belong to the column.
    assert computed(once, **column) == 3
    assert computed(repeating([3, 0, 3, 1]), **column) == 3
    assert computed(repeating([3, 0, 0, 1]), **column) == 3
    assert computed(repeating([3, 3, 0, 1]), **column) == 3
    assert computed(repeating([3, 0, 3, 1]), **column) == 0


def test_images_are_made_ready_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []
    original = Data._batch

    def batch(self: Data, column: str, examples: Sequence[int]) -> torch.Tensor:
        made.extend((column, example) for example in examples)
        return original(self, column, examples)

    columns = {**world.columns, "base": list(world.columns["base"])}
    monkeypatch.setattr(Data, "_batch", batch)
    expected = [("base", 0), *(("base", BASE.index(image)) for image in dict.fromkeys(BASE))]  # one is looked at before
    with ActivationStore() as store:
        captured(store, world, SITE, data=columns, batch_size=2)
    assert made == expected
    made.clear()
    with ActivationStore() as store:
        world.execute(DOCUMENTS[:1], data=columns, batch_size=2, store=store)
    assert made == expected


@pytest.mark.parametrize("streamed", [False, True], ids=["held", "streamed"])
def test_trainings_compute_every_image_once(world: World, tmp_path: Path, streamed: bool) -> None:
    edit = {"op": "inject_subspace", "site": SITE, "basis": "R", "source": "source", "tokens": COLUMN}
    runs = [vmi.Run.model_validate({"name": "das", "interventions": [edit]}), vmi.Run(name="clean")]
    examples, answers = [6, 0, 2, 11, 3], []
    for store in (None, ActivationStore(tmp_path), ActivationStore(tmp_path)):
        basis = torch.linalg.qr(torch.randn(24, 2, generator=torch.Generator().manual_seed(0))).Q.requires_grad_()
        budget = world.one_row(runs, {"R": basis}) if streamed and store is not None else None
        with prepare(
            world.vit, runs, world.columns, {"R": basis}, batch_size=3, progress=False, store=store, memory=budget
        ) as prepared:
            with Counted(world.module) as counted:
                outputs = prepared(examples, {"R": basis})
            outputs[0].square().sum().backward()
        assert basis.grad is not None
        assert counted.rows[0] == 0
        assert (prepared.nbytes == 0) == (budget is not None)
        answers.append((outputs.detach(), basis.grad, prepared.clean_evaluations))
    for outputs, gradient, _ in answers[1:]:
        close(outputs, answers[0][0])
        torch.testing.assert_close(gradient, answers[0][1], rtol=1e-4, atol=1e-5)
    assert torch.equal(answers[1][0], answers[2][0])
    assert torch.equal(answers[1][1], answers[2][1])
    assert float(answers[1][1].abs().max()) > 1e-3
    # Base images pass through all three blocks for the clean run, those of the source through two.
    assert (answers[1][2], answers[2][2]) == (3 * IMAGES + 2 * SOURCES, 0)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_slots_hold_equal_images_together(numbers: list[int]) -> None:
    by_image, by_example = slots_of(np.array(numbers))
    appearing = list(dict.fromkeys(numbers))
    assert [numbers[example] for example in by_image.examples] == appearing
    assert [appearing[slot] for slot in by_image.of] == numbers
    assert by_example.of[by_example.examples].tolist() == list(range(len(numbers)))
    for image, number in enumerate(appearing):
        assert by_image.of_images(range(image, image + 1)) == range(image, image + 1)
        own = by_example.of_images(range(image, image + 1))
        assert by_example.examples[own.start : own.stop].tolist() == [i for i, n in enumerate(numbers) if n == number]
    if len(appearing) == len(numbers):
        assert by_example is by_image
        assert by_image.of.tolist() == list(range(len(numbers)))


def test_examples_of_whose_tokens_none_is_read() -> None:
    """Where an edit puts back what is there, but for a few tokens, its source is read at these alone."""
    world = repeating()
    each = ((), (2, 5), *((),) * (N - 3), (1,))
    read = Read(ColumnOrigin("base"), Site.parse(SITE), Positions(each=each))
    whole = world.oracle.clean("base")[1][SITE]
    with ActivationStore() as store:
        data = Data(world.columns, world.vit)
        images = image_numbers(data, ["base"])["base"]
        own = source.Source(Holdings(store.tiers, world.vit, data, "base", images, [read], 4))
        for examples in ([0, 1], [3, 4], [0, N - 1], [3, 4]):
            found = own.take({read: np.array(examples)})[read]
            wanted = [whole[i, token] for i in examples for token in each[i]]
            assert found.shape == (len(wanted), whole.shape[-1])
            assert all(torch.allclose(one, other, atol=1e-5 * float(whole.abs().max())) for one, other in zip(found, wanted, strict=True))
