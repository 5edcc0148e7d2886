"""Activations that are kept: the right ones, in any order, under any budget, and never computed twice."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.experiments import DOCUMENTS, assert_same_bits, cut_small
from tests.engine.stores import SITES, N, blocks_of, captured, native
from tests.engine.world import Counted, World
from tests.tiny_models import HF_CLIP, TIMM_PLAIN
from vit_mechinterp import ActivationStore
from vit_mechinterp.engine.store import disk, tiers
from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec import TokenBox, TokenColumn


@pytest.fixture(scope="module")
def world() -> World:
    return World(TIMM_PLAIN, N)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few examples each, so that a tiny model fills many of them."""
    blocks_of(monkeypatch, 20_000)


@pytest.mark.parametrize("budgets", [{}, {"host": "40KiB"}, {"host": 0}, {"disk": 0}])
def test_rows_are_what_forwards_give(world: World, tmp_path: Path, budgets: dict[str, Any], small_blocks: None) -> None:
    with ActivationStore(tmp_path, **budgets) as store:
        view = captured(store, world)
        expected = native(world, view.rows_per_forward)
        assert list(view) == world.vit.expand(SITES) == list(view.sites)
        for name, site in view.items():
            assert site.shape == expected[name].shape
            assert len(site) == N
            for index in (7, -1, slice(5, 17), slice(2, None, 7), [3, 20, 1, 3], torch.tensor([24, 0]), np.arange(6)):
                # Attention is explicit in block 1 of these forwards, which moves what follows by rounding.
                torch.testing.assert_close(site[index], expected[name][index], atol=2e-5, rtol=0)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(view["pooled"][order], expected["pooled"][order], atol=2e-5, rtol=0)
        both = view.take([4, 2])
        assert torch.equal(both["embed"], view["embed"][[4, 2]])
        assert torch.equal(view["embed"][:], expected["embed"])


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_the_models_unless_asked(world: World, tmp_path: Path, dtype: torch.dtype | None) -> None:
    view = captured(ActivationStore(tmp_path), world, "blocks.0.resid_post", dtype=dtype)["blocks.0.resid_post"]
    expected = native(world)["blocks.0.resid_post"]
    assert view.dtype == view[3].dtype == (dtype or torch.float32)
    assert torch.equal(view[:], expected.to(dtype or torch.float32))
    with ActivationStore(tmp_path) as again:
        assert torch.equal(captured(again, world, "blocks.0.resid_post", dtype=dtype)["blocks.0.resid_post"][:], view[:])


def test_tokens_and_heads_are_chosen_as_in_specs(world: World, tmp_path: Path, small_blocks: None) -> None:
    expected = native(world)
    with ActivationStore(tmp_path) as store:
        named = captured(store, world, "blocks.0.resid_post", tokens=["cls", 2])["blocks.0.resid_post"]
        assert torch.equal(named[[5, 1]], expected["blocks.0.resid_post"][[5, 1]][:, [0, 3]])
        patches = world.columns["here"]
        own = captured(store, world, "blocks.0.attn.z", tokens=TokenColumn(column="here"), heads=1)["blocks.0.attn.z"]
        whole = expected["blocks.0.attn.z"]
        assert torch.equal(own[20], whole[20, 1 + patches[20]][:, 1:2])
        assert own.shape == (N, 3, 1, 8)
        queries = captured(store, world, "blocks.0.attn.pattern", tokens=["cls", 3], heads=[0, 2])["blocks.0.attn.pattern"]
        assert queries.shape == (N, 2, 2, 17)
        torch.testing.assert_close(queries[9], expected["blocks.0.attn.pattern"][9][[0, 2]][:, [0, 4]])
        boxed = captured(store, world, "embed", tokens=TokenBox(box="box"))["embed"]
        rows = boxed[[3, 0]]
        assert isinstance(rows, list)
        assert len({len(row) for row in boxed[:]}) > 1
        with pytest.raises(SpecError, match="differ in number between examples"):
            _ = boxed.shape
        again = ActivationStore(tmp_path)
        with Counted(world.module) as counted:
            other = captured(again, world, "embed", tokens=TokenBox(box="box"))["embed"][[3, 0]]
        assert counted.total == 0
        assert all(torch.equal(a, b) for a, b in zip(rows, other, strict=True))


@pytest.mark.parametrize("fresh", [False, True])
def test_nothing_is_computed_twice(world: World, tmp_path: Path, fresh: bool) -> None:
    store = ActivationStore(tmp_path)
    with Counted(world.module) as first:
        one = captured(store, world)
    assert first.total == 3 * N
    store = ActivationStore(tmp_path) if fresh else store
    with Counted(world.module) as second:
        # Whatever batches it was computed in, unless they are asked for.
        other = captured(store, world, batch_size="auto")
        assert all(torch.equal(one[name][:], other[name][:]) for name in one)
    assert second.total == 0
    with Counted(world.module) as third:
        captured(store, world, ["blocks.0.resid_mid", "blocks.0.resid_post"])
    assert third.rows == [N, 0, 0]


def test_what_decides_the_values_is_told_apart(world: World, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path)
    site = "blocks.0.resid_post"
    before = captured(store, world, site)[site][:]

    def computed(other: World = world, **options: Any) -> int:
        other.vit.sites()
        with Counted(other.module) as counted:
            captured(store, other, site, **options)
        return counted.total

    changed = World(TIMM_PLAIN, N)
    with torch.no_grad():
        changed.module.blocks[2].norm1.bias.add_(1)
    images = world.columns["base"].clone()
    images[24, 0, 0, 0] += 1
    assert computed() == 0
    assert computed(column="source") == N
    assert computed(data={"base": images}) == N
    assert computed(data={"photo": world.columns["base"]}, column="photo") == 0
    assert computed(changed) == N
    assert computed(dtype=torch.float16) == N
    assert computed(tokens="cls") == 0  # is part of what is there
    assert computed(batch_size=5) == N
    world.module.blocks[0].norm1.bias.data.add_(1)  # leaves no trace on the tensor
    try:
        assert computed() == N
        assert not torch.equal(captured(store, world, site)[site][:], before)
    finally:
        world.module.blocks[0].norm1.bias.data.sub_(1)


def test_tokens_come_from_whole_activations(world: World, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path)
    whole = captured(store, world, "blocks.1.resid_post")["blocks.1.resid_post"]
    with Counted(world.module) as counted:
        boxes = captured(store, world, "blocks.1.resid_post", tokens=TokenColumn(column="here"))["blocks.1.resid_post"]
        rows = boxes[[9, 2]]
    assert counted.total == 0
    expected = torch.stack([whole[i][1 + world.columns["here"][i]] for i in (9, 2)])
    assert torch.equal(rows, expected)


def test_budgets_are_kept(world: World, tmp_path: Path, small_blocks: None, caplog: pytest.LogCaptureFixture) -> None:
    with ActivationStore(tmp_path, host="64KiB", disk="90KiB") as store, caplog.at_level(logging.WARNING):
        view = captured(store, world, "blocks.*.resid_post")
        whole = N * 17 * 24 * 4 * 3
        assert whole > 100 * 1024
        for index in range(0, N, 2):
            view.take([index])
            usage = store.usage()
            assert usage["host"] <= 64 * 1024
            assert usage["disk"] <= 90 * 1024
            assert usage["disk"] == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
        assert "will be computed again when they are asked for" in caplog.text
        # What went is computed again, to the same bits.
        expected = native(world, view.rows_per_forward)
        assert all(torch.equal(view[name][:], expected[name]) for name in view)


@pytest.mark.parametrize("beside", [1, tiers._BESIDE])
@pytest.mark.parametrize("host", [0, "48KiB", "96KiB"])
def test_everything_reaches_the_disk_past_a_host_that_cannot_hold_a_block_of_each_value(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: int | str, beside: int
) -> None:
    monkeypatch.setattr(tiers, "_BESIDE", beside)
    blocks_of(monkeypatch, 20_000, least=20_000)
    with ActivationStore(tmp_path, host=host) as store:
        view = captured(store, world, ["embed", "blocks.*.attn.z", "blocks.*.mlp_out", "blocks.*.resid_post"])
        assert len(view) * 20_000 > 96 * 1024
        expected = native(world, view.rows_per_forward)
        with Counted(world.vit.module) as counted:
            for name in view:
                assert torch.equal(view[name][:], expected[name])
        assert counted.launches == 0


def test_blocks_beside_the_budget_do_not_pile_up(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of(monkeypatch, 8 * 17 * 24 * 4)
    monkeypatch.setattr(tiers, "_BESIDE", 1)
    with ActivationStore(tmp_path, host=0) as store:
        view = captured(store, world, "blocks.1.resid_post")
        expected = native(world)["blocks.1.resid_post"]
        for path in tmp_path.rglob("*.safetensors"):
            path.unlink()
        for index in range(0, N, 8):  # one batch of each block, so that none is completed
            assert torch.equal(view["blocks.1.resid_post"][[index]][0], expected[index])
            assert len(store.tiers.outgoing.blocks) <= 1


def test_the_least_recently_used_leave(world: World, tmp_path: Path, small_blocks: None) -> None:
    site = "blocks.0.resid_post"
    with ActivationStore(tmp_path, host=0) as store:
        captured(store, world, site)
        paths = sorted(tmp_path.rglob("*.safetensors"))
        assert len(paths) >= 3
        for age, path in enumerate(paths):
            os.utime(path, (1_000_000 - age, 1_000_000 - age))
        size = sum(path.stat().st_size for path in paths)
    with ActivationStore(tmp_path, host=0, disk=size * 8 // 5) as store:
        view = captured(store, world, site)
        view[site][N - 1]  # the oldest file is used
        captured(store, world, site, column="source")
        left = {path for path in paths if path.exists()}
        assert paths[-1] in left
        assert paths[-2] not in left


def test_reading_a_row_does_not_read_the_file(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = "blocks.0.resid_post"
    captured(ActivationStore(tmp_path), world, site)
    looked_at: list[int] = []
    original = disk.checksum
    monkeypatch.setattr(disk, "checksum", lambda x: (looked_at.append(len(x)), original(x))[1])
    with ActivationStore(tmp_path, host=0) as store:
        view = captured(store, world, site)
        assert torch.equal(view[site][[3, 11]], native(world)[site][[3, 11]])
    assert looked_at == [1, 1]


@pytest.mark.parametrize("host", ["1GiB", "20KiB", 0])
def test_experiments_read_what_others_computed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Any, small_blocks: None
) -> None:
    cut_small(monkeypatch)
    with ActivationStore(tmp_path, host=host) as store, Counted(world.module) as first:
        one = world.execute(DOCUMENTS, batch_size=4, store=store)
    with ActivationStore(tmp_path, host=host) as store, Counted(world.module) as second:
        other = world.execute(DOCUMENTS, batch_size=4, store=store)
    assert_same_bits(one, other)
    without = world.execute(DOCUMENTS, batch_size=4)
    assert float((one.logits - without.logits).abs().max()) < 1e-5 * world.scale
    plain = [{**document, "capture": ["pooled"]} for document in DOCUMENTS]
    with ActivationStore(tmp_path, host=host) as store:
        world.check(plain, world.execute(plain, batch_size=4, store=store), effect=None)
    # What is left are the rows of the interventions: swap from behind block 1, the mean from behind block 0,
    # resampling from block 1, the push from block 2.
    assert second.rows == [0, 2 * N, 4 * N]
    assert first.rows[0] >= 2 * N


def test_a_captured_store_serves_an_experiment_of_other_runs(world: World, tmp_path: Path) -> None:
    document = {
        "name": "swap",
        "interventions": [
            {
                "op": "interchange",
                "site": "blocks.1.resid_post",
                "source": "source",
                "tokens": {"column": "here"},
                "source_tokens": {"column": "there"},
            }
        ],
    }
    with ActivationStore(tmp_path) as store:
        for column in ("base", "source"):
            captured(store, world, "blocks.1.resid_post", column=column)
        with Counted(world.module) as counted:
            results = world.execute([document], store=store)
        assert counted.rows == [0, 0, N]
        world.check([document], results)


def test_trainings_read_their_clean_part(world: World, tmp_path: Path) -> None:
    from vit_mechinterp.engine import prepare

    run = vmi.Run.model_validate(
        {
            "name": "das",
            "interventions": [
                {"op": "inject_subspace", "site": "blocks.1.resid_post", "basis": "R", "source": "source", "tokens": "cls"}
            ],
        }
    )
    basis = torch.linalg.qr(torch.randn(24, 2)).Q.requires_grad_()
    answers = []
    for _ in range(2):
        store = ActivationStore(tmp_path)
        with prepare(world.vit, run, world.columns, {"R": basis}, progress=False, store=store) as prepared:
            outputs = prepared([4, 1], {"R": basis})
            outputs.sum().backward()
            answers.append((outputs.detach(), basis.grad.clone(), prepared.clean_evaluations))
            basis.grad = None
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])
    assert float(answers[0][1].abs().max()) > 0
    assert (answers[0][2], answers[1][2]) == (4 * N, 0)


def test_outputs_that_are_no_logits_are_stored_too(tmp_path: Path) -> None:
    world = World(HF_CLIP, 6)
    output = world.vit.layout.output
    assert output not in world.vit.sites()
    edit = {"op": "interchange", "site": "blocks.1.resid_post", "source": "source", "tokens": [1, 2]}
    documents = [{"name": "clean"}, {"name": "swap", "interventions": [edit]}]
    with ActivationStore(tmp_path) as store:
        first = world.execute(documents, store=store)
        world.check(documents, first)
        runs = [vmi.Run.model_validate(document) for document in documents]
        assert "everything that clean forwards give is stored" in str(vmi.plan(world.vit, runs, world.columns, store=store))
        with Counted(world.module) as counted:  # whose hooks keep the last block whole, which rounds otherwise
            again = world.execute(documents, store=store)
        assert torch.equal(again["clean"], first["clean"])
        assert torch.allclose(again["swap"], first["swap"], atol=1e-5 * world.scale)
        assert counted.total == 6  # the one block behind the edit


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, "float16"])
def test_activations_are_kept_as_floating_point_numbers(world: World, tmp_path: Path, dtype: Any) -> None:
    with ActivationStore(tmp_path) as store, pytest.raises(SpecError, match=r"kept as torch\.float16, .*; got"):
        store.capture(world.vit, world.columns, "embed", dtype=dtype, progress=False)


def test_a_truth_value_is_no_batch_size(world: World, tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as store, pytest.raises(SpecError, match="positive integer, got True"):
        store.capture(world.vit, world.columns, "embed", batch_size=True, progress=False)
