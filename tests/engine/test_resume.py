"""An experiment that is stopped goes on where it was, repeats nothing, and gives the same bits."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.experiments import DOCUMENTS, N, assert_same_bits
from tests.engine.stopped import run, stopped
from tests.engine.world import Counted, World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import Results
from vit_mechinterp.engine.files.sealed import open_document, seal_document
from vit_mechinterp.errors import ExecutionError

pytestmark = pytest.mark.usefixtures("small_chunks")

def test_results_written_as_they_come_are_the_same_bits(world: World, whole: Results, tmp_path: Path) -> None:
    results = run(world, tmp_path / "new" / "folder")
    assert_same_bits(results, whole)
    assert results.provenance == whole.provenance
    plain = [{**document, "capture": ["pooled"]} for document in DOCUMENTS]
    world.check(plain, world.execute(plain, out=tmp_path / "plain"), effect=None)
    folder = results.save(tmp_path / "copy")
    assert_same_bits(Results.load(folder), whole)


def test_what_is_finished_is_not_computed_again(
    world: World, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Counted(world.module) as everything:  # whose hooks see every token, so every token is computed
        whole = run(world, tmp_path_factory.mktemp("whole"))
    with Counted(world.module):
        stopped(world, tmp_path, 3, monkeypatch)
    with Counted(world.module) as rest:
        assert_same_bits(run(world, tmp_path), whole)
    # Of four chunks one is left; images that others need too pass again, and none for the dataset means.
    assert 0 < 3 * rest.total < everything.total
    with Counted(world.module) as nothing:
        assert_same_bits(run(world, tmp_path), whole)
    assert nothing.total == 0
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        "experiment.json",
        "results.json",
        "results.safetensors",
    ]


def script(name: str, folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", name, str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL before and after every file takes its name, and within the writing of files."""
    found = script("tests.engine.killed", tmp_path)
    assert found["killed"] == found["points"] >= 20
    assert found["repeated"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_many_more_moments(tmp_path: Path) -> None:
    found = script("tests.engine.killed", tmp_path, "--many")
    assert found["points"] > 40
    assert found["repeated"] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_share_the_chunks_of_one_folder(tmp_path: Path) -> None:
    """No chunk is computed twice; what one that is killed had begun, the other does."""
    found = script("tests.engine.beside", tmp_path)
    assert sum(found["both live"]) == found["chunks"] == 4
    assert min(found["both live"]) > 0
    assert found["one dies"][0] == 1
    assert sum(found["one dies"]) == found["chunks"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    """Both at once, several times over; each gives the bits of one alone, and nothing is left behind."""
    script = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from tests.engine.experiments import *\n"
        "from tests.engine.killed import in_child, run\n"
        "from tests.engine.world import World\n"
        "from tests.tiny_models import TIMM_PLAIN\n"
        "torch.set_num_threads(1)\n"
        "cut_small()\n"
        "world = World(TIMM_PLAIN, 8)\n"
        "whole = run(world, None)\n"
        "def one(folder):\n"
        "    assert_same_bits(run(world, folder), whole)\n"
        "for n in range(4):\n"
        "    folder = Path(sys.argv[1]) / str(n)\n"
        "    other = os.fork()\n"
        "    if other == 0:\n"
        "        os._exit(abs(in_child(lambda: one(folder))))\n"
        "    assert in_child(lambda: one(folder)) == 0\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0\n"
        "    assert_same_bits(run(world, folder), whole)\n"
        "    assert not list(folder.rglob('*.tmp'))\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


Change = Callable[[World], dict[str, Any]]


def _other_model(world: World) -> dict[str, Any]:
    other = World(TIMM_PLAIN, N)
    with torch.no_grad():
        other.module.head.bias.add_(1)
    return {"world": other}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_other_model, r"the model differs \(\w{12}\.\.\. there, \w{12}\.\.\. here\)"),
        (lambda w: {"documents": DOCUMENTS[:-1]}, "run 'push' only there"),
        (
            lambda w: {"documents": [*DOCUMENTS[:-1], {**DOCUMENTS[2], "name": "push"}, {"name": "more"}]},
            r"run 'push' differs; run 'more' only here",
        ),
        (lambda w: {"documents": DOCUMENTS[::-1]}, "the order of runs differs"),
        (
            lambda w: {"data": {**w.columns, "base": w.columns["base"] + 1, "label": 1 - w.columns["label"]}},
            r"column 'base', 'label', 'base \(preprocessing\)' differ\.",
        ),
        (lambda w: {"tensors": {"direction.24": torch.ones(24)}}, "run 'push' differs; tensor 'direction.24' differs"),
        (lambda w: {"world": World(TIMM_PLAIN, N, torch.float64)}, r"the dtype differs \(float32 there, float64 here\)"),
        (lambda w: {"data": {k: v[:4] for k, v in w.columns.items()}}, r"the examples differ \(8 there, 4 here\)"),
    ],
)
def test_another_experiment_is_refused_by_name(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, text: str
) -> None:
    stopped(world, tmp_path, 1, monkeypatch)
    options = change(world)
    other = options.pop("world", world)
    other.vit.sites()  # looks at shapes once, with a forward of its own
    with Counted(other.module) as counted, pytest.raises(ExecutionError, match=text) as error:
        other.execute(options.pop("documents", DOCUMENTS), batch_size=2, out=tmp_path, **options)
    assert counted.total == 0
    assert f"delete {tmp_path / 'chunks'} to begin anew" in str(error.value)


def test_chunks_are_those_of_the_first_start(
    world: World, whole: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(world, tmp_path, 2, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert_same_bits(run(world, tmp_path, batch_size=4), whole)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} was begun with other chunks, which are kept so that the results are the same: "
        "2 examples per chunk, 2 rows per forward."
    ]


def test_other_circumstances_are_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(world, tmp_path, 2, monkeypatch)
    path = tmp_path / "chunks" / "experiment.json"
    document = open_document(path.read_bytes())
    assert document is not None
    document["circumstances"]["threads"] = 99
    path.write_bytes(seal_document(document))
    with caplog.at_level(logging.WARNING):
        run(world, tmp_path)
    assert "so later chunks may differ in their last bits: the threads differ (99 there" in caplog.text


def test_what_a_store_holds_by_then_changes_no_bits(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clean forwards hold the images that they held at the first start."""
    auto: dict[str, Any] = {"batch_size": "auto", "out": tmp_path / "a"}
    with monkeypatch.context() as patch, vmi.ActivationStore() as store:
        patch.setattr("vit_mechinterp.engine.forwards.chunk.run_wave", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            world.execute(DOCUMENTS, store=store, **auto)
    whole = world.execute(DOCUMENTS, store=vmi.ActivationStore(), batch_size="auto")
    with vmi.ActivationStore() as store:
        for column in ("base", "source"):
            store.capture(world.vit, world.columns, "*.resid_post", column=column, batch_size=1, progress=False)
        other = world.execute(DOCUMENTS, store=store)
        results = world.execute(DOCUMENTS, store=store, **auto)
    assert other.provenance["images_per_stored_forward"] != whole.provenance["images_per_stored_forward"]
    assert results.provenance["images_per_stored_forward"] == whole.provenance["images_per_stored_forward"]
    assert_same_bits(results, whole)


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_memory_that_runs_out_is_one_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vit_mechinterp.engine.forwards import chunk

    original = chunk.run_wave

    def small(vit: Any, segments: Any, *args: Any, **options: Any) -> Any:
        if sum(len(segment.examples) for segment in segments) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(vit, segments, *args, **options)

    monkeypatch.setattr(chunk, "run_wave", small)
    store = vmi.ActivationStore()
    with caplog.at_level(logging.WARNING):
        results = run(world, tmp_path / "out", batch_size=4, store=store)
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory at 4 rows per forward: going on with 2.",
        "Out of memory at 2 rows per forward: going on with 1.",
    ]
    assert results.provenance["halvings"] == 2
    assert results.provenance["rows_per_forward"] == 4
    again = world.execute(DOCUMENTS, batch_size=4)
    assert float((again.logits - results.logits).abs().max()) < 1e-5 * world.scale
