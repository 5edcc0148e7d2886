"""A store in trouble: damaged files, others in the same folder, no room, no memory, bad input."""

from __future__ import annotations

import logging
import mmap
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.stores import N, blocks_of, captured, native
from tests.engine.world import Counted, World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import ActivationStore
from vit_mechinterp.engine.store import disk, holdings, source, tiers
from vit_mechinterp.engine.store.keys import Entry, Key
from vit_mechinterp.engine.store.memory import Block
from vit_mechinterp.engine.store.reading import read_items
from vit_mechinterp.errors import DataError, ExecutionError, SpecError, UnsupportedSiteError


@pytest.fixture(scope="module")
def world() -> World:
    return World(TIMM_PLAIN, N)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few examples each, so that a tiny model fills many of them."""
    blocks_of(monkeypatch, 20_000)


@pytest.mark.parametrize("host", ["1GiB", 0])
@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "other"])
def test_damaged_files_are_dropped_and_made_again(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, host: Any, small_blocks: None
) -> None:
    site = "blocks.0.resid_post"
    before = captured(ActivationStore(tmp_path), world, site)[site][:]
    paths = sorted(tmp_path.rglob("*.safetensors"))
    content = bytearray(paths[1].read_bytes())
    content[-400] ^= 16
    damaged = {"flipped": bytes(content), "truncated": bytes(content[:-9]), "empty": b"", "other": paths[-1].read_bytes()[:50]}
    paths[1].write_bytes(damaged[how])
    with ActivationStore(tmp_path, host=host) as store, caplog.at_level(logging.WARNING):
        view = captured(store, world, site)
        with Counted(world.module) as counted:
            assert torch.equal(view[site][:], before)
        assert 0 < counted.total < N
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith(f"Stored activations {paths[1]} are damaged (")
    assert messages[0].endswith("): dropped, and computed again.")
    with ActivationStore(tmp_path, host=host) as store, Counted(world.module) as counted:
        assert torch.equal(captured(store, world, site)[site][:], before)
    # Batches at the borders of the block gave their neighbours' rows as well; the block itself is whole again.
    assert counted.total == 0


def test_files_that_cannot_be_read_are_left_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, small_blocks: None
) -> None:
    site = "blocks.0.resid_post"
    before = captured(ActivationStore(tmp_path), world, site)[site][:]
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    path, original = sorted(contents)[1], disk.read_tensors

    def refused(own: Path) -> Any:
        if own == path:
            raise OSError(24, "Too many open files")
        return original(own)

    monkeypatch.setattr(disk, "read_tensors", refused)
    with ActivationStore(tmp_path, host=0) as store, caplog.at_level(logging.WARNING):
        view = captured(store, world, site)
        with Counted(world.module) as counted:
            assert torch.equal(view[site][:], before)
            assert torch.equal(view[site][:], before)
        assert 0 < counted.total < 2 * N
    assert [record.getMessage() for record in caplog.records] == [
        f"Stored activations {path} cannot be read ([Errno 24] Too many open files): left as they are, and computed again."
    ]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == contents
    entry = next(tmp_path.rglob("entry.json"))
    document, read = entry.read_bytes(), Path.read_bytes

    def locked(own: Path) -> bytes:
        if own == entry:
            raise PermissionError(13, "Permission denied")
        return read(own)

    monkeypatch.setattr(Path, "read_bytes", locked)
    with ActivationStore(tmp_path, host=0) as store, caplog.at_level(logging.WARNING):
        assert torch.equal(captured(store, world, site)[site][:], before)
    assert "Activations can no longer be written ([Errno 13] Permission denied)" in caplog.records[-2].getMessage()
    monkeypatch.undo()
    assert entry.read_bytes() == document


def test_a_folder_without_a_document_is_no_number_of_images(world: World, tmp_path: Path) -> None:
    captured(ActivationStore(tmp_path), world, "embed", batch_size=4)
    (next(tmp_path.rglob("entry.json")).parents[1] / "7").mkdir()
    assert captured(ActivationStore(tmp_path), world, "embed", batch_size="auto").rows_per_forward == 4


def test_parts_of_a_block_come_from_several_memories() -> None:
    own = tiers.Tiers(None, 0, 2**20, 0)
    entry = own.add(Entry(Key("m", "i", "s", "t", None, "float32", "p", "cpu", (), 4), 6, (3,), 6))
    values = torch.arange(18.0).view(6, 3)
    own.put(entry, range(2), values[:2])
    beside = Block(values.clone(), values, np.array([False, False, False, True, True, False]))
    own.outgoing.blocks[entry.key.name, 0] = beside
    out = torch.full((5, 3), -1.0)
    absent = read_items(own, entry, np.array([4, 1, 2, 0, 3]), out)
    assert absent.tolist() == [2]
    expected = values[[4, 1, 2, 0, 3]]
    expected[2] = -1
    assert torch.equal(out, expected)


def test_a_part_in_memory_outlives_a_damaged_file(tmp_path: Path) -> None:
    values = torch.arange(18.0).view(6, 3)
    wanted = Entry(Key("m", "i", "s", "t", None, "float32", "p", "cpu", (), 4), 6, (3,), 6)
    before = tiers.Tiers(tmp_path, 0, 2**20, 2**20)
    before.put(before.add(wanted), range(6), values)
    before.close()
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[content.index(values.numpy().tobytes())] ^= 16
    path.write_bytes(content)
    own = tiers.Tiers(tmp_path, 0, 2**20, 2**20)
    entry = own.add(wanted)
    own.put(entry, range(2), values[:2])
    out = torch.full((6, 3), -1.0)
    assert read_items(own, entry, np.arange(6), out).tolist() == [2, 3, 4, 5]
    assert torch.equal(out[:2], values[:2])
    assert not path.exists()
    own.close()


def test_a_folder_is_not_gone_through_for_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[Path, tuple[float, int, Path]] = {}
    looked = []

    def there(self: Any) -> list[tuple[float, int, Path]]:
        looked.append(1)
        return list(files.values())

    monkeypatch.setattr(disk.DiskTier, "_files", there)
    monkeypatch.setattr(disk.DiskTier, "_forget", lambda self, path: files.pop(path))
    tier = disk.DiskTier(tmp_path, 2_000 * 1_000)
    for n in range(10_000):
        tier._make_room(1_000)
        path = tmp_path / str(n)
        files[path] = float(n), 1_000, path
        assert len(files) <= 2_000
        if n == 1_900:
            assert len(looked) < 60
    assert len(files) > 1_900
    assert tier.dropped == 10_000 - len(files)
    assert min(used for used, _, _ in files.values()) == tier.dropped
    assert len(looked) < 10_000 // 5


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from tests.engine.world import World\n"
        "from tests.tiny_models import TIMM_PLAIN\n"
        "from vit_mechinterp import ActivationStore\n"
        "from vit_mechinterp.engine.store import holdings\n"
        "holdings._LEAST_BLOCK_BYTES, holdings._BLOCK_BYTES = 1, 5000\n"
        "torch.set_num_threads(1)\n"
        "world = World(TIMM_PLAIN, 25)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "with ActivationStore(sys.argv[1], disk='150KiB') as store:\n"
        "    for _ in range(3):\n"
        "        view = store.capture(world.vit, world.columns, ['blocks.*.resid_post'], batch_size=4, progress=False)\n"
        "        for i in range(25):\n"
        "            view.take([i, 24 - i])\n"
        "    print(sum(float(view[name][:].double().sum()) for name in view))\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(command, cwd=root, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert not any("damaged" in error for _, error in answers)
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_threads_on_one_store(world: World, tmp_path: Path, small_blocks: None) -> None:
    wrong: list[str] = []
    with ActivationStore(tmp_path, host="64KiB") as store:
        view = captured(store, world, "blocks.*.resid_post")
        expected = native(world, view.rows_per_forward)

        def reading(seed: int) -> None:
            draw = np.random.default_rng(seed)
            for _ in range(20):
                chosen = draw.integers(0, N, 5)
                for name, rows in view.take(chosen).items():
                    if not torch.equal(rows, expected[name][chosen]):
                        wrong.append(name)

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(reading, seed) for seed in range(4)]:
                done.result()  # or what the thread has raised
    assert not wrong


def test_a_disk_that_is_full_is_left_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vit_mechinterp.engine.files.tensorfiles.TensorWriter.write", full)
    with ActivationStore(tmp_path) as store, caplog.at_level(logging.WARNING):
        view = captured(store, world, "pooled")
        assert torch.equal(view["pooled"][:], native(world)["pooled"])
    assert caplog.text.count("can no longer be written") == 1


@pytest.mark.parametrize("host", ["1GiB", 0])
def test_files_are_read_past_a_disk_that_is_full(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Any, small_blocks: None
) -> None:
    sites = ["blocks.0.resid_post", "pooled"]
    expected = native(world)
    captured(ActivationStore(tmp_path), world, sites[0])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vit_mechinterp.engine.files.tensorfiles.TensorWriter.write", full)
    with ActivationStore(tmp_path, host=host) as store:
        other = captured(store, world, sites[1])
        with Counted(world.module) as counted:
            view = captured(store, world, sites[0])
            assert torch.equal(view[sites[0]][:], expected[sites[0]])
        assert counted.total == 0
        assert torch.equal(other[sites[1]][:], expected[sites[1]])
        assert not store.tiers.outgoing.blocks


def test_a_host_with_less_memory_than_the_budget_says_holds_less(
    world: World, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    given: list[int] = []
    original = mmap.mmap

    def most(fileno: int, size: int, **options: Any) -> Any:
        if len(given) == 3:
            raise OSError(12, "Cannot allocate memory")
        given.append(size)
        return original(fileno, size, **options)

    monkeypatch.setattr(mmap, "mmap", most)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with ActivationStore() as store:
        view = captured(store, world, "blocks.*.resid_post")
        assert all(torch.equal(view[name][:], native(world)[name]) for name in view)
        assert 0 <= store.usage()["host"] <= sum(given)  # what was not given does not count
        assert len(given) == 3


def test_blocks_that_fill_up_without_a_budget_are_few_bytes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "_BESIDE", 60_000)
    monkeypatch.setattr(holdings, "_LEAST_BLOCK_BYTES", 1)
    beside = []
    original = tiers.Tiers._fill

    def fill(self: Any, *args: Any) -> None:
        original(self, *args)
        beside.append(sum(block.tensor.nbytes for block in self.outgoing.blocks.values() if not block.complete))

    monkeypatch.setattr(tiers.Tiers, "_fill", fill)
    sites = ["embed", "blocks.*.resid_mid", "blocks.*.resid_post", "blocks.*.ln2", "blocks.*.ln1", "ln_final"]
    with ActivationStore(tmp_path, host=0) as store:
        view = captured(store, world, sites, batch_size=1)
        assert len(view) * N * 17 * 24 * 4 > 500_000
        assert torch.equal(view["embed"][:], native(world)["embed"])
    assert 20_000 < max(beside) <= 60_000


def test_memory_that_runs_out_is_one_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = source.Source._forward

    def small(self: Any, batch: range, reads: Any) -> Any:
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, batch, reads)

    monkeypatch.setattr(source.Source, "_forward", small)
    with ActivationStore(tmp_path) as store, caplog.at_level(logging.WARNING):
        view = captured(store, world, "pooled", batch_size=8)
        assert view.rows_per_forward == 2
        torch.testing.assert_close(view["pooled"][:], native(world)["pooled"], atol=2e-5, rtol=0)
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory at 8 rows per forward: going on with 4.",
        "Out of memory at 4 rows per forward: going on with 2.",
    ]


def test_bad_input_is_said(world: World, tmp_path: Path) -> None:
    store = ActivationStore()
    with pytest.raises(SpecError, match="disk='1GiB' bounds the files of a folder, and there is none"):
        ActivationStore(disk="1GiB")
    with pytest.raises(SpecError, match="host='many' is no amount of memory"):
        ActivationStore(host="many")
    with pytest.raises(DataError, match=r"capture: the data has no column 'bases'\. Close matches: base"):
        captured(store, world, "embed", column="bases")
    with pytest.raises(SpecError, match="head 3 is out of range"):
        captured(store, world, "blocks.0.attn.z", heads=3)
    with ActivationStore() as store, pytest.raises(SpecError, match="heads: '0' is not an integer"):
        captured(store, world, "blocks.0.attn.z", heads="0")
    with ActivationStore() as store, pytest.raises(SpecError, match="heads: True is not an integer"):
        captured(store, world, "blocks.0.attn.z", heads=True)
    with pytest.raises((UnsupportedSiteError, SpecError), match=r"mlp\.pre_linear"):
        captured(store, world, "blocks.0.mlp.pre_linear")
    with pytest.raises(SpecError, match="batch_size is 'auto' or a positive integer"):
        captured(store, world, "pooled", batch_size=0)
    with pytest.raises(SpecError, match=r"There is no site to capture\. Name some, such as"):
        captured(store, world, [])
    with pytest.raises(SpecError, match=r"Wrap it: vit_mechinterp\.wrap\(module\)"):
        store.capture(world.module, world.columns, "embed")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ExecutionError, match="Activations cannot be kept in"):
        ActivationStore(tmp_path / "file" / "folder")
    dropping = World(TIMM_PLAIN, 2)
    dropping.module.train()
    dropping.module.blocks[0].attn.proj_drop.p = 0.1
    with pytest.raises(ExecutionError, match="drop activations at random"):
        captured(store, dropping, "embed")


def test_room_is_made_by_another_thread_while_a_file_is_opened(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ActivationStore(tmp_path, host=0) as store:
        expected = captured(store, world, "pooled")["pooled"][:]
    threads = []

    def interrupted(path: Path, **_: Any) -> None:
        threads.append(threading.Thread(target=tier._forget, args=(path,)))
        threads[-1].start()
        threads[-1].join(timeout=0.1)

    with ActivationStore(tmp_path, host=0) as store:
        tier = store.tiers.disk
        monkeypatch.setattr(os, "utime", interrupted)
        assert torch.equal(captured(store, world, "pooled")["pooled"][:], expected)
    assert threads
    for thread in threads:
        thread.join()
