"""An experiment in a folder, and one that is interrupted once some of its chunks are finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engine.experiments import DOCUMENTS
from tests.engine.world import World
from vit_mechinterp import Results
from vit_mechinterp.engine.results import resume


def run(world: World, folder: Path, documents: Sequence[Mapping[str, Any]] = DOCUMENTS, **options: Any) -> Results:
    return world.execute(documents, **{"batch_size": 2, "out": folder, **options})


def stopped(world: World, folder: Path, after: int, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> None:
    """Run until some chunks are finished, then be interrupted."""
    original = resume.FinishedChunks.add
    finished = 0

    def add(self: Any, *args: Any) -> None:
        nonlocal finished
        original(self, *args)
        finished += 1
        if finished == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume.FinishedChunks, "add", add)
        with pytest.raises(KeyboardInterrupt):
            run(world, folder, *args, **options)
