"""A process that is killed: run by `test_resume`, as ``python -m tests.engine.killed FOLDER``.

Every experiment runs in a child that is forked from here, so that torch is imported once. What is printed is one JSON
document.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.engine.experiments import DOCUMENTS, N, assert_same_bits, cut_small
from tests.engine.world import World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp.engine.files.tensorfiles import TensorWriter
from vit_mechinterp.engine.results import resume


def run(world: World, folder: Path | None) -> Any:
    return world.execute(DOCUMENTS, batch_size=2, out=folder)


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked process, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killing(owner: type, name: str, at: int, *, before: bool) -> None:
    """Kill this process at one call of a method."""
    original = getattr(owner, name)
    calls = 0

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and before:
            os.kill(os.getpid(), signal.SIGKILL)
        value = original(*args, **options)
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, counting)


def main(folder: Path, *, many: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    cut_small()
    world = World(TIMM_PLAIN, N)
    whole = run(world, None)
    chunks = -(-N // whole.provenance["chunk"])
    points = [("replace", Path, at, before) for at in range(1, chunks + 5) for before in (True, False)]
    points += [("write", TensorWriter, at, False) for at in range(2, 60, 2 if many else 11)]
    killed = repeated = 0
    for n, (name, owner, at, before) in enumerate(points):
        own = folder / str(n)

        def first(own: Path = own, name: str = name, owner: type = owner, at: int = at, before: bool = before) -> None:
            killing(owner, name, at, before=before)
            run(world, own)

        def second(own: Path = own) -> None:
            computed = 0
            original = resume.FinishedChunks.add

            def counting(self: Any, *args: Any) -> None:
                nonlocal computed
                computed += 1
                original(self, *args)

            resume.FinishedChunks.add = counting  # type: ignore[method-assign]
            results = run(world, own)
            assert_same_bits(results, whole)
            os._exit(100 + computed)

        status = in_child(first)
        assert status in (0, -signal.SIGKILL), (name, at, before, status)
        killed += status != 0
        left = list((own / "chunks").glob("[!.]*.safetensors")) if own.exists() else []
        done = (own / "results.json").exists()
        # The dataset means have a file too.
        finished = chunks if done else max(0, len(left) - 1)
        computed = in_child(second) - 100
        assert 0 <= computed <= chunks, (name, at, before, computed)
        repeated += computed - (chunks - finished)
        unfinished = [path for path in own.rglob("*.tmp") if str(os.getpid()) in path.name]
        assert not unfinished
    return {"points": len(points), "killed": killed, "repeated": repeated, "chunks": chunks}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), many="--many" in sys.argv)))
