"""Who computes what, where several processes work on one folder: a lock on a file for each piece of work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

__all__ = ["in_turn", "waited_for"]

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.6
"""Seconds between two looks at what other processes have finished."""

Found = TypeVar("Found")


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether the work that a file stands for is ours inside the ``with`` block.

    The system lets go of the lock when its process ends, however it ends, so no claim outlives its owner.
    Where files cannot be locked everybody may work: who computes a thing twice writes the same twice.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        ours = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            ours = False
        except OSError:
            pass  # this file system has no locks
        try:
            yield ours
        finally:
            if ours:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)


def in_turn(
    waiting: list[range],
    has: Callable[[range], bool],
    can_begin: Callable[[range], bool],
    is_done: Callable[[], bool],
    lock: Callable[[range], Path],
) -> Generator[range, None, None]:
    """Pieces of work, each locked for us until the next is asked for; what is finished leaves ``waiting``.

    Where all that are left are locked by others, wait until they are finished or their owners have ended.

    Args:
        waiting: what is to be done.
        has: whether a piece is finished.
        can_begin: whether all that it needs is finished.
        is_done: whether there is nothing to do any more, whatever ``waiting`` says.
        lock: the file to lock.
    """
    pause = _FIRST_PAUSE
    while waiting and not is_done():
        taken = False
        for piece in list(waiting):
            if not has(piece) and can_begin(piece):
                with _claimed(lock(piece)) as ours:
                    # It may have been finished between the look and the lock.
                    if ours and not has(piece) and not is_done():
                        taken = True
                        yield piece
            if has(piece):
                waiting.remove(piece)
        if not taken and waiting:
            if pause == _FIRST_PAUSE:
                logger.info("Waiting for %d chunks that other processes compute.", len(waiting))
            time.sleep(pause)
        pause = _FIRST_PAUSE if taken else min(2 * pause, _LONGEST_PAUSE)
    waiting.clear()


@contextmanager
def waited_for(lock: Path, find: Callable[[], Found | None]) -> Iterator[Found | None]:
    """What ``find`` gives as soon as it gives something, or None once it is locked for us to make."""
    while True:
        with _claimed(lock) as ours:
            found = find()
            if ours or found is not None:
                yield found
                return
        time.sleep(_FIRST_PAUSE)
