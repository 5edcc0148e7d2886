"""A capture that is killed: run by `test_store_shared`, as ``python -m tests.engine.killed_store FOLDER``.

Every capture runs in a child that is forked from here, so that torch is imported once. What is printed is one JSON
document.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.engine.killed import in_child, killing
from tests.engine.stores import N, captured, native
from tests.engine.world import Counted, World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import ActivationStore
from vit_mechinterp.engine.files.tensorfiles import TensorWriter
from vit_mechinterp.engine.store import holdings

SITES = ["embed", "blocks.*.resid_post"]
POINTS: list[tuple[str, type, int, bool]] = [
    ("replace", Path, 1, True),  # the first says how large blocks are
    ("replace", Path, 2, False),
    ("replace", Path, 5, True),  # the first of a block
    ("replace", Path, 8, False),
    ("write", TensorWriter, 1, False),
    ("write", TensorWriter, 14, False),
]


def main(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    holdings._LEAST_BLOCK_BYTES, holdings._BLOCK_BYTES = 1, 20_000
    world = World(TIMM_PLAIN, N)
    expected = native(world)
    killed, images = 0, []

    def capture(own: Path, host: Any) -> None:
        """Exit with 100 more than the number of images that pass through the model."""
        with Counted(world.module) as counted, ActivationStore(own, host=host) as store:
            view = captured(store, world, SITES)
            assert all(torch.equal(view[name][:], expected[name]) for name in view)
        os._exit(100 + counted.rows[0])

    for n, (name, owner, at, before) in enumerate(POINTS):
        own, host = folder / str(n), "1GiB" if n % 2 else 0

        def first(own: Path = own, host: Any = host, point: Any = (owner, name, at)) -> None:
            killing(*point, before=before)  # noqa: B023  # called within the loop
            capture(own, host)

        killed += in_child(first) == -signal.SIGKILL
        images.append([in_child(lambda own=own, host=host: capture(own, host)) - 100 for _ in range(2)])
    return {"points": len(POINTS), "killed": killed, "images": images}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
