"""Two processes on one folder: run by `test_resume`, as ``python -m tests.engine.beside FOLDER``.

What is printed is one JSON document: how many chunks each process computed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.engine.experiments import N, assert_same_bits, cut_small
from tests.engine.killed import run
from tests.engine.world import World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp.engine.results import resume

CRASHED = 1


def counting(report: Path, slow: float, dies_at: int | None) -> None:
    """Note every chunk that this process computes; die in the middle of one, lock in hand."""
    original = resume.FinishedChunks.add
    computed = 0

    def add(self: Any, *args: Any) -> None:
        nonlocal computed
        computed += 1
        if computed == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(slow)
        original(self, *args)
        report.write_text(str(computed))

    resume.FinishedChunks.add = add  # type: ignore[method-assign]


def started(work: Callable[[], None]) -> int:
    """The id of a forked process."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(CRASHED)
        os._exit(0)
    return child


def main(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    cut_small()
    world = World(TIMM_PLAIN, N)
    whole = run(world, None)
    chunks = -(-N // whole.provenance["chunk"])
    found: dict[str, Any] = {"chunks": chunks}
    for name, dies_at in (("both live", None), ("one dies", 2)):
        own = folder / name
        reports = [folder / f"{name} {k}" for k in range(2)]

        def work(k: int, own: Path = own, reports: list[Path] = reports, dies_at: int | None = dies_at) -> None:
            counting(reports[k], 0.05, dies_at if k == 0 else None)
            assert_same_bits(run(world, own), whole)

        children = [started(lambda k=k: work(k)) for k in range(2)]
        status = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert status == [0 if dies_at is None else -signal.SIGKILL, 0], status
        assert not list(own.glob("chunks/*.lock"))
        found[name] = [int(path.read_text()) if path.exists() else 0 for path in reports]
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
