"""Folders of experiments that are damaged, foreign or full: it is said, and what is finished is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.experiments import DOCUMENTS, assert_same_bits, cut_small
from tests.engine.stopped import run, stopped
from tests.engine.world import World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import Results
from vit_mechinterp.engine.results import resume
from vit_mechinterp.errors import ExecutionError

N = 8


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)


@pytest.fixture(scope="module")
def world() -> World:
    return World(TIMM_PLAIN, N)


@pytest.fixture
def whole(world: World) -> Results:
    results = world.execute(DOCUMENTS, batch_size=2)
    assert results.provenance["chunk"] == 2
    return results


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "other", "no rows", "other words"])
def test_damaged_chunks_are_computed_again(
    world: World,
    whole: Results,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    stopped(world, tmp_path, 3, monkeypatch)
    paths = list((tmp_path / "chunks").glob("*.safetensors"))
    for path in paths[:2]:
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        sound = path.read_bytes()
        damaged = {
            "flipped": bytes(content),
            "truncated": bytes(content[:-7]),
            "empty": b"",
            "other": b"x" * 99,
            "no rows": sound.replace(b'"width":"2"', b'"width":"0"'),
            "other words": sound.replace(b'"halvings"', b'"halvingr"'),
        }
        assert damaged[how] != sound
        path.write_bytes(damaged[how])
    with caplog.at_level(logging.WARNING):
        assert_same_bits(run(world, tmp_path), whole)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is damaged; it is dropped, and computed again." for path in sorted(paths[:2], key=_order(caplog))
    ]


def _order(caplog: pytest.LogCaptureFixture) -> Callable[[Path], int]:
    return lambda path: next(n for n, record in enumerate(caplog.records) if str(path) in record.getMessage())


@pytest.mark.parametrize("how", ["flipped", "empty", "gone", "other label", "no checksum"])
def test_damaged_results_are_made_anew(
    world: World, whole: Results, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    run(world, tmp_path)
    path, document = tmp_path / "results.safetensors", tmp_path / "results.json"
    content, text = bytearray(path.read_bytes()), document.read_text()
    content[-3] ^= 1
    match how:
        case "flipped":
            path.write_bytes(content)
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
        case "other label":
            document.write_text(text.replace('"label": [\n', '"lapel": [\n'))
        case "no checksum":
            document.write_text(text.replace('"checksum"', '"checksun"'))
    assert how in ("flipped", "empty", "gone") or document.read_text() != text
    with caplog.at_level(logging.WARNING):
        assert_same_bits(run(world, tmp_path), whole)
    assert f"The results in {tmp_path} are damaged, or some are gone; they are made anew" in caplog.text
    assert_same_bits(run(world, tmp_path), whole)


def test_what_was_decided_and_is_damaged_can_be_deleted(
    world: World, whole: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks that are finished are found again by the same call."""
    stopped(world, tmp_path, 3, monkeypatch)
    path = tmp_path / "chunks" / "experiment.json"
    path.write_bytes(path.read_bytes().replace(b'"chunk": 2', b'"chunk": 0'))
    with pytest.raises(ExecutionError, match=r"experiment\.json is damaged, .* delete it: what the same call has finished"):
        run(world, tmp_path)
    path.unlink()
    original, added = resume.FinishedChunks.add, []
    with monkeypatch.context() as patch:
        patch.setattr(resume.FinishedChunks, "add", lambda self, *args: (added.append(args[0]), original(self, *args)))
        assert_same_bits(run(world, tmp_path), whole)
    assert added == [range(6, 8)]


def test_a_folder_that_is_something_else_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "experiment.json").write_text("{}")
    with pytest.raises(ExecutionError, match="or not what an experiment leaves there"):
        run(world, tmp_path)
    (tmp_path / "chunks" / "experiment.json").unlink()
    (tmp_path / "chunks" / "store.json").write_text("[2]")
    with pytest.raises(ExecutionError, match=r"store\.json is damaged, or not what an experiment leaves there\. Choose another"):
        run(world, tmp_path, store=vmi.ActivationStore())
    (tmp_path / "file").write_text("")
    if Path("/proc/self").exists():  # where folders cannot be made, and are said not to exist
        with pytest.raises(ExecutionError, match=r"Results cannot be written into /proc/here: No such file or directory"):
            run(world, Path("/proc/here"))
    with pytest.raises(ExecutionError, match=r"Results cannot be written into .*file"):
        run(world, tmp_path / "file")


def test_a_full_disk_is_said_and_survived(
    world: World, whole: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vit_mechinterp.engine.results.tensorfiles.TensorWriter.write", full)
        with pytest.raises(ExecutionError, match=r"No space left on device\. Choose another folder, or make room"):
            run(world, tmp_path)
    assert_same_bits(run(world, tmp_path), whole)


def test_a_chunk_that_another_process_removes_while_it_is_opened_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has joined all chunks by then, so this is no damage."""
    from safetensors.torch import save_file

    from vit_mechinterp.engine.results.tensorfiles import read_tensors

    path = tmp_path / "chunk.safetensors"
    save_file({"outputs": torch.ones(3)}, path)
    assert read_tensors(path)[0]["outputs"].sum() == 3
    opened = torch.UntypedStorage.from_file

    def late(*args: Any, **options: Any) -> Any:
        path.unlink()
        return opened(*args, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", late)
    with pytest.raises(FileNotFoundError, match=r"chunk\.safetensors"):
        read_tensors(path)
