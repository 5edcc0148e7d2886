"""One folder or one store in several hands: processes that read the same files, threads that fill and wait."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.stores import N, blocks_of, captured, native
from tests.engine.world import Counted, World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import ActivationStore
from vit_mechinterp.engine.files.tensorfiles import first_come
from vit_mechinterp.engine.store import disk, source
from vit_mechinterp.engine.store.memory import Block
from vit_mechinterp.engine.store.writer import Writer

SITE = "blocks.0.resid_post"
ITEM = 17 * 24 * 4


@pytest.fixture(scope="module")
def world() -> World:
    return World(TIMM_PLAIN, N)


def together(*works: Any) -> None:
    """Run some functions in threads of their own; raise what they raise."""
    raised: list[BaseException] = []

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def test_who_reads_a_file_does_not_make_others_check_it_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_USED_SECONDS", 0.0)
    captured(ActivationStore(tmp_path), world, SITE)
    checked = []
    original = disk.checksum
    monkeypatch.setattr(disk, "checksum", lambda x: (checked.append(len(x)), original(x))[1])
    views = [captured(ActivationStore(tmp_path, host=0), world, SITE)[SITE] for _ in range(2)]
    for _ in range(4):
        for view in views:
            assert torch.equal(view[[3]], native(world)[SITE][[3]])
            time.sleep(0.01)
    assert checked == [1, 1]


def test_a_file_in_use_is_not_the_least_recently_used(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of(monkeypatch, 8 * ITEM)
    monkeypatch.setattr(disk, "_USED_SECONDS", 0.0)
    captured(ActivationStore(tmp_path), world, SITE)
    paths = sorted(tmp_path.rglob("*.safetensors"))
    size = sum(path.stat().st_size for path in paths)
    with ActivationStore(tmp_path, host=0, disk=size * 8 // 5) as store:
        rows = captured(store, world, SITE)[SITE]
        rows[[0]]  # maps the first
        time.sleep(0.05)
        rows[[9]], rows[[17]]
        time.sleep(0.05)
        rows[[0]]  # and uses it again
        captured(store, world, SITE, column="source")
        left = [path.exists() for path in paths]
    assert left[:2] == [True, False]


@pytest.mark.parametrize(
    "damage",
    [lambda text: b"{", lambda text: text.replace(b'"block": 8', b'"block": 0'), lambda text: text.replace(b"24", b"26")],
    ids=["cut", "no slots", "other shape"],
)
def test_blocks_of_another_size_under_the_same_name_are_not_taken(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    blocks_of(monkeypatch, 8 * ITEM)
    captured(ActivationStore(tmp_path), world, SITE)
    (entry,) = tmp_path.rglob("entry.json")
    entry.write_bytes(damage(entry.read_bytes()))
    blocks_of(monkeypatch, 1 * ITEM)  # the last file, of the last image alone, has the name of the fourth
    for rows in ([0, 24], [3], range(N)):
        with ActivationStore(tmp_path) as store:
            assert torch.equal(captured(store, world, SITE)[SITE][list(rows)], native(world)[SITE][list(rows)])
    assert len(list(tmp_path.rglob("*.safetensors"))) == N


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_first_to_come_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Also where several have one process number, as in containers that share a folder."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    original = os.link

    def link(*paths: Any) -> None:
        time.sleep(0.01)  # the others write meanwhile
        if not links:
            raise OSError(errno.EPERM, "Operation not permitted")
        original(*paths)

    monkeypatch.setattr(os, "link", link)
    ours: dict[int, bool] = {}

    def come(n: int) -> None:
        ours[n] = first_come(tmp_path / "entry.json", str(n).encode())

    if links:
        together(*(lambda n=n: come(n) for n in range(4)))  # type: ignore[misc]
    else:
        for n in range(4):
            come(n)
    assert sorted(ours.values()) == [False, False, False, True]
    assert ours[int((tmp_path / "entry.json").read_text())]
    assert [path.name for path in tmp_path.iterdir()] == ["entry.json"]


class Copying:
    """A copy from a GPU that is under way."""

    def __init__(self) -> None:
        self.begun, self.done = threading.Event(), threading.Event()

    def synchronize(self) -> None:
        self.begun.set()
        assert self.done.wait(5)


def test_every_thread_waits_for_a_copy() -> None:
    block, copying, waited = Block(torch.zeros(1), torch.zeros(1), np.ones(1, dtype=bool)), Copying(), []
    block.copying.append(copying)  # type: ignore[arg-type]

    def first() -> None:
        block.settle()

    def second() -> None:
        assert copying.begun.wait(5)
        block.settle()
        waited.append(copying.done.is_set())

    def end() -> None:
        assert copying.begun.wait(5)
        time.sleep(0.05)
        copying.done.set()

    together(first, second, end)
    assert waited == [True]
    assert block.copying == []


def test_every_thread_waits_for_what_is_written() -> None:
    writer, begun, done = Writer(), threading.Event(), threading.Event()
    blocks = [Block(torch.zeros(1), torch.zeros(1), np.ones(1, dtype=bool)) for _ in range(2)]

    def slowly() -> None:
        begun.set()
        assert done.wait(5)

    for block in blocks:
        writer.submit(block, slowly)
    waited: list[bool] = []

    def waiting() -> None:
        assert begun.wait(5)
        writer.flush()
        waited.append(done.is_set() and not any(block.busy for block in blocks))

    def end() -> None:
        assert begun.wait(5)
        time.sleep(0.05)
        done.set()

    together(waiting, waiting, waiting, end)
    assert waited == [True] * 3

    def fails() -> None:
        raise ZeroDivisionError

    writer.submit(blocks[0], fails)
    with pytest.raises(ZeroDivisionError):
        writer.flush()
    assert blocks[0].busy == 0
    writer.submit(blocks[0], lambda: None)
    writer.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL around the moment when a file takes its name, and within its writing: the bits are the same afterwards,
    blocks that are on the disk are not computed again, and then nothing is."""
    command = [sys.executable, "-m", "tests.engine.killed_store", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] == found["points"] == 6
    assert [again for _, again in found["images"]] == [0] * 6
    once = [first for first, _ in found["images"]]
    assert once[:3] == [N] * 3
    assert 0 < min(once[3], once[5]) < N


def test_a_view_outlives_what_its_store_forgets(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = native(world)
    blocks_of(monkeypatch, 8 * ITEM)
    with ActivationStore() as store:
        view = captured(store, world, SITE)[SITE]
        store.clear()
        assert store.usage() == {"gpu": 0, "host": 0, "disk": 0}
        blocks_of(monkeypatch, 2 * ITEM)
        other = captured(store, world, SITE)[SITE]
        for rows in (view, other):
            assert torch.equal(rows[[20, 3, 9]], expected[SITE][[20, 3, 9]])


def test_a_store_that_is_closed_holds_no_file_open(world: World, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, host=0)
    view = captured(store, world, SITE)[SITE]
    expected = view[[4, 21]]
    assert store.tiers.disk is not None
    assert store.tiers.disk._open
    store.close()
    assert not store.tiers.disk._open
    with Counted(world.module) as counted:
        assert torch.equal(view[[4, 21]], expected)
    assert counted.total == 0


def test_whole_activations_are_looked_through_a_few_at_a_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap = {
        "op": "interchange", "site": SITE, "source": "source", "tokens": {"column": "here"},
        "source_tokens": {"column": "there"},
    }  # fmt: skip
    documents = [{"name": "swap", "interventions": [swap]}]
    with ActivationStore(tmp_path) as store:
        for column in ("base", "source"):
            captured(store, world, SITE, column=column)
    blocks_of(monkeypatch, 4 * ITEM)
    made: list[int] = []
    original = source.Source._empty

    def empty(self: Any, entry: Any, slots: Any) -> torch.Tensor:
        found = original(self, entry, slots)
        if self.holdings.column == "source":
            made.append(found.nbytes)
        return found

    monkeypatch.setattr(source.Source, "_empty", empty)
    with ActivationStore(tmp_path, host=0) as store, Counted(world.module) as counted:
        results = world.execute(documents, store=store)
    assert counted.rows[0] == 0
    assert sum(made) == N * ITEM
    assert max(made) == 4 * ITEM
    world.check(documents, results)
