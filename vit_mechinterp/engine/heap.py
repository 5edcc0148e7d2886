"""Memory that was freed goes back to the operating system.

glibc keeps freed blocks for later, as many as it likes, so a process holds more than what is alive in it.
Where a budget was given, that counts too.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["give_back", "thrifty"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt``."""
_LARGE = 128 * 2**10
"""Blocks of so many bytes are returned as soon as they are freed, in `thrifty`: where glibc begins."""
_LARGEST = 32 * 2**20
"""Up to here glibc raises that limit by itself in a process that frees large blocks."""

_TUNED_BY = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}

_lock = threading.Lock()
_users = 0


def give_back() -> None:
    """Return freed memory to the operating system; nothing happens where the C library has no call for it."""
    trim = _function("malloc_trim", ctypes.c_size_t)
    if trim is not None:
        trim(0)


@contextmanager
def thrifty() -> Iterator[None]:
    """Return large blocks to the operating system as soon as they are freed, for a ``with`` block.

    Without it, blocks of many sizes leave holes that together take as much as what is alive. Page faults take
    about a tenth more time in exchange. Afterwards the limit is where glibc takes it by itself in a process
    that frees large tensors. Nothing happens in other C libraries, or where the environment sets the limit.
    """
    global _users
    tune = None if _is_tuned() else _function("mallopt", ctypes.c_int, ctypes.c_int)
    with _lock:
        _users += 1
        if _users == 1 and tune is not None:
            tune(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        give_back()
        with _lock:
            _users -= 1
            if _users == 0 and tune is not None:
                tune(_MMAP_THRESHOLD, _LARGEST)
                tune(_TRIM_THRESHOLD, 2 * _LARGEST)


def _is_tuned() -> bool:
    """Whether whoever started the process has set the limits."""
    return not _TUNED_BY.isdisjoint(os.environ)


@cache
def _function(name: str, *arguments: type) -> Callable[..., int] | None:
    """A function of glibc; None in other C libraries."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # only glibc has it
        found = getattr(library, name)
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes, found.restype = list(arguments), ctypes.c_int
    return found  # type: ignore[no-any-return]
