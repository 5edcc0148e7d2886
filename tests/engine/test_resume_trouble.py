"""Folders of experiments that are damaged, foreign or full: it is said, and what is finished is kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

import vit_mechinterp as vmi
from tests.engine.experiments import DOCUMENTS, assert_same_bits
from tests.engine.stopped import run, stopped
from tests.engine.world import World
from vit_mechinterp import Results
from vit_mechinterp.engine.files import sealed
from vit_mechinterp.engine.files.sealed import open_document, seal_document
from vit_mechinterp.engine.files.tensorfiles import read_tensors
from vit_mechinterp.engine.results import begun, resume
from vit_mechinterp.errors import ExecutionError

pytestmark = pytest.mark.usefixtures("small_chunks")

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
    assert len(paths) >= 2
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


def test_chunks_that_cannot_be_read_are_left_alone(
    world: World, whole: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(world, tmp_path, 3, monkeypatch)
    contents = {path: path.read_bytes() for path in (tmp_path / "chunks").glob("*.safetensors")}
    assert len(contents) >= 2

    def refused(path: Path) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(sealed, "read_tensors", refused)
        with pytest.raises(
            ExecutionError, match=rf"Results cannot be read from {tmp_path}: Too many open files\. Mend that; what is fini"
        ):
            run(world, tmp_path)
    assert {path: path.read_bytes() for path in contents} == contents
    assert_same_bits(run(world, tmp_path), whole)
    with monkeypatch.context() as patch:
        patch.setattr(begun, "file_checksum", refused)
        with pytest.raises(ExecutionError, match=r"cannot be read from .*: Too many open files\. Mend that"):
            run(world, tmp_path)
    assert (tmp_path / "results.json").exists()


def test_a_file_that_cannot_be_opened_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.safetensors"
    with pytest.raises(FileNotFoundError):
        read_tensors(path)
    path.write_bytes(b"sound, for all that is known")

    def refused(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("No such file")

    monkeypatch.setattr(safetensors, "safe_open", refused)
    with pytest.raises(OSError, match=r"some\.safetensors cannot be opened: No such file") as caught:
        read_tensors(path)
    assert not isinstance(caught.value, FileNotFoundError)


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
    (tmp_path / "chunks" / "store.json").write_bytes(seal_document({"base": 3}))
    with pytest.raises(ExecutionError, match=r"store\.json is damaged, or not what an experiment leaves there\. Choose another"):
        run(world, tmp_path, store=vmi.ActivationStore())
    (tmp_path / "file").write_text("")
    if Path("/proc/self").exists():  # where folders cannot be made, and are said not to exist
        with pytest.raises(ExecutionError, match=r"Results cannot be written into /proc/here: No such file or directory"):
            run(world, Path("/proc/here"))
    with pytest.raises(ExecutionError, match=r"Results cannot be written into .*file: it is a file\. Choose another folder\.$"):
        run(world, tmp_path / "file")


def test_a_full_disk_is_said_and_survived(
    world: World, whole: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vit_mechinterp.engine.files.tensorfiles.TensorWriter.write", full)
        with pytest.raises(ExecutionError, match=r"No space left on device\. Choose another folder, or make room"):
            run(world, tmp_path)
    assert_same_bits(run(world, tmp_path), whole)


def _removing(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, remove: Callable[[Path], object], folder: Path
) -> None:
    """Let something of a folder be removed before one method is called."""
    original = getattr(owner, name)

    def late(*args: Any, **options: Any) -> Any:
        remove(folder)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, late)


def test_finished_chunks_that_are_removed_meanwhile_are_said(
    world: World, whole: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = r"chunks/\w{40}\.safetensors is gone: something has removed it while .* Make the same call again"
    with monkeypatch.context() as patch:
        _removing(patch, resume.FinishedChunks, "finish", lambda own: next(own.glob("chunks/*.safetensors")).unlink(), tmp_path)
        with pytest.raises(ExecutionError, match=said):
            run(world, tmp_path)
    assert_same_bits(run(world, tmp_path), whole)


def test_a_folder_of_chunks_that_is_removed_meanwhile_is_said(
    world: World, whole: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _removing(patch, resume.FinishedChunks, "add", lambda own: shutil.rmtree(own / "chunks"), tmp_path)
        with pytest.raises(ExecutionError, match=r"chunks is gone: something has removed it while .* is computed\."):
            run(world, tmp_path)
    assert_same_bits(run(world, tmp_path), whole)


def test_outputs_of_finished_chunks_that_are_removed_meanwhile_are_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (push,) = DOCUMENTS[4]["interventions"]
    documents = [{"name": f"push {n}", "interventions": [{**push, "alpha": n}]} for n in range(1, 5)]
    repeated = {"base": world.columns["base"][[0, 1, 2, 3, 0, 1, 2, 3]]}
    _removing(
        monkeypatch,
        resume.FinishedChunks,
        "outputs_of",
        lambda own: [path.unlink() for path in own.glob("chunks/*.safetensors")],
        tmp_path,
    )
    with pytest.raises(ExecutionError, match=r"\.safetensors is gone: something has removed it while"):
        world.execute(documents, data=repeated, batch_size=2, out=tmp_path)


def test_a_document_that_says_less_of_the_chunks_is_no_reason_to_warn(
    world: World, whole: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(world, tmp_path, 2, monkeypatch)
    path = tmp_path / "chunks" / "experiment.json"
    document = open_document(path.read_bytes())
    assert document is not None
    del document["schedule"]["holds"]
    path.write_bytes(seal_document(document))
    with caplog.at_level(logging.WARNING):
        assert_same_bits(run(world, tmp_path), whole)
    assert not caplog.records


def test_a_chunk_that_another_process_removes_while_it_is_opened_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has joined all chunks by then, so this is no damage."""
    from safetensors.torch import save_file

    from vit_mechinterp.engine.files.tensorfiles import read_tensors

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
