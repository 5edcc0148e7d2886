"""Complete blocks on their way to the disk: written in a thread of their own, in order, while few wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from vit_mechinterp.engine.store.memory import Block

__all__ = ["Writer"]

_MOST_PENDING = 2
"""Blocks that wait to be written at most."""


class Writer:
    """Writes blocks behind the back of whoever fills them; several threads may fill, and wait."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._guard = threading.Lock()

    def submit(self, block: Block, write: Callable[[], None]) -> None:
        """Have a block written, which stays in memory until it is; wait while too many others are."""
        self._wait(_MOST_PENDING - 1)
        with self._guard:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="activations")
            block.busy += 1
            self._pending.append(self._pool.submit(self._write, block, write))

    def _write(self, block: Block, write: Callable[[], None]) -> None:
        try:
            block.settle()
            write()
        finally:
            with self._guard:
                block.busy -= 1

    def _wait(self, most: int) -> None:
        """Wait until at most so many blocks are left of those that are pending."""
        with self._guard:
            waiting = self._pending[: max(0, len(self._pending) - most)]
        for own in waiting:
            try:
                own.result()
            finally:
                # Only those that are written leave: another thread that waits must find the others.
                with self._guard, suppress(ValueError):
                    self._pending.remove(own)

    def flush(self) -> None:
        """Wait until every block is written."""
        self._wait(0)

    def close(self) -> None:
        """Wait until every block is written, and end the thread."""
        self.flush()
        with self._guard:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
