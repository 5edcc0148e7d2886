"""What becomes of memory that was freed: kept for the next forward, or given back to the operating system.

A large block that glibc gets anew from the operating system costs a page fault for every 4 KiB of it, which
every forward pays if blocks go back as soon as they are freed. What it keeps, a process holds beside what is
alive in it; where a budget was given, that counts too.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["GivingBack", "give_back", "keeping", "keeping_while", "thrifty", "uncollected"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt``."""
_LARGE = 128 * 2**10
"""Blocks of so many bytes are returned as soon as they are freed, in `thrifty`: where glibc begins."""
_LARGEST = 32 * 2**20
"""Up to here glibc raises that limit by itself in a process that frees large blocks."""
_KEPT, _UNTRIMMED = 256 * 2**20, 2**30
"""In `keeping`, smaller blocks stay in the process, and as much as that behind the last block in use."""

_LARGEST_HOLE, _MOST_HOLES = 2**28, 1024
"""Bytes of the largest piece of free memory that is taken at once, and most pieces."""

_TUNED_BY = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}

_lock = threading.RLock()  # what is collected while it is held may leave, too
_thrifty: set[object] = set()
_keeping: set[object] = set()
_looked = threading.Event()
_set = [(_LARGEST, 2 * _LARGEST)]
"""The limits that were set last; glibc gets there by itself."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Make many small objects that live on without the garbage collector looking for reference cycles among
    them, which takes longer the more a process holds."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def give_back() -> None:
    """Return freed memory to the operating system; nothing happens where the C library has no call for it."""
    trim = _function("malloc_trim", ctypes.c_int, ctypes.c_size_t)
    if trim is not None:
        trim(0)


class GivingBack:
    """Returns freed memory to the operating system, when called, if the process has come to hold more.

    Small tensors come from what is free between others, wherever that is, so a process comes to hold more
    than is alive in it, forward by forward. To look at that costs far less than to return it each time.

    Args:
        growth: bytes of anonymous memory that it may hold more than after the last time.
    """

    def __init__(self, growth: int) -> None:
        self.growth = growth
        self._level = _anonymous()

    def __call__(self) -> None:
        if _anonymous() > self._level + self.growth:
            give_back()
            self._level = _anonymous()


def _anonymous() -> int:
    """Bytes of this process's anonymous memory; 0 where the system does not say."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_bytes().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * mmap.PAGESIZE


@contextmanager
def thrifty() -> Iterator[None]:
    """Return large blocks to the operating system as soon as they are freed, for a ``with`` block.

    What lies free between others when it begins is left out: whichever blocks fit would go there, and stay.

    Without it, blocks of many sizes leave holes that together take as much as what is alive. Page faults take
    about a tenth more time in exchange. Afterwards the limit is where glibc takes it by itself in a process
    that frees large tensors. Nothing happens in other C libraries, or where the environment sets the limit.
    """
    with _tuned(_thrifty):
        give_back()
        try:
            with _without_holes():
                yield
        finally:
            give_back()


class _Use(ctypes.Structure):
    """What glibc's ``mallinfo2`` says of the heap; ``hblkhd`` are bytes of blocks that stand alone."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
            "keepcost",
        )
    ]  # fmt: skip


@contextmanager
def _without_holes() -> Iterator[None]:
    """Take what is free in the heap, in large pieces, for a ``with`` block, so that large tensors stand alone
    and go back. Nobody writes there, so it takes no memory."""
    use = None if _is_tuned() else _function("mallinfo2", _Use)
    take = _function("malloc", ctypes.c_void_p, ctypes.c_size_t)
    free = _function("free", None, ctypes.c_void_p)
    if use is None or take is None or free is None:
        yield
        return
    holes: list[int] = []
    size = _LARGEST_HOLE
    while size >= _LARGE and len(holes) < _MOST_HOLES:
        before, found, after = use(), take(size), use()
        if after.uordblks - before.uordblks >= size and after.hblkhd == before.hblkhd:
            holes.append(found)
        else:  # it stands alone, or another C library has given it
            free(found)
            size //= 2
    try:
        yield
    finally:
        for hole in holes:
            free(hole)


@contextmanager
def keeping() -> Iterator[None]:
    """Keep freed blocks for the next forward, for a ``with`` block in which nobody is `thrifty`.

    By itself glibc gives the large blocks of a forward back at its end, or keeps them, as their sizes happen
    to fall; faults then take about a twentieth of the time. Afterwards limits are as `thrifty` leaves them,
    and what is free stays in the process until the next large block behind all others is freed.
    """
    with _tuned(_keeping):
        yield


def keeping_while(owner: object) -> None:
    """As `keeping`, for as long as some object is there, and with up to `_KEPT` bytes from then on: whoever
    looks at activations once does so again, and each time would pay for the memory that they take."""
    _looked.set()
    entered = ExitStack()
    entered.enter_context(keeping())
    weakref.finalize(owner, entered.close).atexit = False


@contextmanager
def _tuned(users: set[object]) -> Iterator[None]:
    own = object()
    users.add(own)
    _set_limits()
    try:
        yield
    finally:
        users.discard(own)
        _set_limits()


def _set_limits() -> None:
    """Set what all who are in a ``with`` block come to, if that has changed."""
    tune = None if _is_tuned() else _function("mallopt", ctypes.c_int, ctypes.c_int, ctypes.c_int)
    with _lock:
        while tune is not None and (limits := _limits()) != _set[0]:
            _set[0] = limits
            for parameter, limit in zip((_MMAP_THRESHOLD, _TRIM_THRESHOLD), limits, strict=True):
                tune(parameter, limit)


def _limits() -> tuple[int, int]:
    """Bytes from which a block stands alone, and from which free memory behind all others goes back."""
    if _thrifty:
        return _LARGE, 2 * _LARGEST
    if _keeping:
        return _KEPT, _UNTRIMMED
    return (_KEPT, _KEPT) if _looked.is_set() else (_LARGEST, 2 * _LARGEST)


def _is_tuned() -> bool:
    """Whether whoever started the process has set the limits."""
    return not _TUNED_BY.isdisjoint(os.environ)


@cache
def _function(name: str, result: Any = ctypes.c_int, *arguments: type) -> Callable[..., Any] | None:
    """A function of glibc; None in other C libraries, or in one without it."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # only glibc has it
        found = getattr(library, name)
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes, found.restype = list(arguments), result
    return found  # type: ignore[no-any-return]
