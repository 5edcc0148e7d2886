"""Large blocks go back to the system at once while somebody asks for it, and only then."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

import vit_mechinterp as vmi
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp.model import heap

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Of glibc's ``malloc.h``."""
AFTERWARDS_AT_ONCE = [(32 * 2**20, 64 * 2**20)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """What the C library is asked for."""
    made: list[tuple[str, tuple[int, ...]]] = []

    def function(name: str, *_: type) -> Callable[..., int] | None:
        if name not in ("mallopt", "malloc_trim"):
            return None
        return lambda *arguments: made.append((name, arguments)) or 1  # type: ignore[func-returns-value]

    monkeypatch.setattr(heap, "_function", function)
    monkeypatch.setattr(heap.os, "environ", {})
    for name, users in (("_thrifty", set()), ("_keeping", set()), ("_looked", threading.Event()), ("_set", list(AFTERWARDS_AT_ONCE))):
        monkeypatch.setattr(heap, name, users)  # caches of other tests may be there
    return made


def limits(calls: list[tuple[str, tuple[int, ...]]]) -> list[tuple[int, ...]]:
    return [arguments for name, arguments in calls if name == "mallopt"]


THRIFTY = [(MMAP_THRESHOLD, 128 * 2**10), (TRIM_THRESHOLD, 64 * 2**20)]
KEEPING = [(MMAP_THRESHOLD, 256 * 2**20), (TRIM_THRESHOLD, 2**30)]
AFTERWARDS = [(MMAP_THRESHOLD, 32 * 2**20), (TRIM_THRESHOLD, 64 * 2**20)]
ONCE_LOOKED = [(MMAP_THRESHOLD, 256 * 2**20), (TRIM_THRESHOLD, 256 * 2**20)]


def test_the_first_lowers_the_limit_and_the_last_raises_it(calls: list[tuple[str, tuple[int, ...]]]) -> None:
    with heap.thrifty():
        assert limits(calls) == THRIFTY
        with heap.thrifty():
            pass
        assert limits(calls) == THRIFTY
        assert calls[-1] == ("malloc_trim", (0,))
    assert limits(calls) == THRIFTY + AFTERWARDS


def test_blocks_are_kept_while_nobody_is_thrifty(calls: list[tuple[str, tuple[int, ...]]]) -> None:
    with heap.keeping():
        assert limits(calls) == KEEPING
        with heap.thrifty(), heap.keeping():
            assert limits(calls) == KEEPING + THRIFTY
        assert limits(calls) == KEEPING + THRIFTY + KEEPING
    assert limits(calls) == KEEPING + THRIFTY + KEEPING + AFTERWARDS


@pytest.mark.parametrize("manner", [heap.thrifty, heap.keeping])
def test_the_limit_is_as_before_after_an_exception(
    calls: list[tuple[str, tuple[int, ...]]], manner: Callable[[], AbstractContextManager[None]]
) -> None:
    with pytest.raises(KeyboardInterrupt), manner():
        raise KeyboardInterrupt
    assert limits(calls)[-2:] == AFTERWARDS


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_limits_from_outside_are_left_alone(
    calls: list[tuple[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(heap.os, "environ", {name: "1"})
    with heap.thrifty(), heap.keeping():
        pass
    assert limits(calls) == []


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap._function.cache_clear()
    try:
        assert heap._function("malloc_trim") is None
        with heap.thrifty():
            heap.give_back()
    finally:
        heap._function.cache_clear()


def test_blocks_are_kept_while_an_object_is_there(calls: list[tuple[str, tuple[int, ...]]]) -> None:
    class Owner:
        pass

    first, second = Owner(), Owner()
    heap.keeping_while(first)
    assert limits(calls) == KEEPING
    heap.keeping_while(second)
    del first
    assert limits(calls) == KEEPING
    with heap.thrifty():
        del second
        assert limits(calls) == KEEPING + THRIFTY
    assert limits(calls) == KEEPING + THRIFTY + ONCE_LOOKED


def test_blocks_are_kept_while_there_is_a_cache(calls: list[tuple[str, tuple[int, ...]]]) -> None:
    """In a loop over batches the last one's cache is there until the next one's is. Afterwards what one took is kept for
    whoever looks again."""
    vit = vmi.wrap(TIMM_PLAIN.module())
    vit.run(TIMM_PLAIN.images(1))
    assert limits(calls) == []
    for _ in range(3):
        _, cache = vit.run(TIMM_PLAIN.images(1), capture=["embed"])
        assert limits(calls) == KEEPING
    del cache
    assert limits(calls) == KEEPING + ONCE_LOOKED


def test_whoever_is_collected_meanwhile_is_counted(
    calls: list[tuple[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python may find, in the middle of setting limits, that an owner is gone."""

    class Owner:
        pass

    owners = [Owner()]
    heap.keeping_while(owners[0])
    original = heap._limits

    def collecting() -> tuple[int, int]:
        found = original()
        owners.clear()
        return found

    with monkeypatch.context() as patch, heap.thrifty():
        patch.setattr(heap, "_limits", collecting)
        with heap.keeping():
            pass
    assert limits(calls)[-2:] == ONCE_LOOKED


def test_memory_goes_back_once_more_is_held_than_after_the_last_time(
    calls: list[tuple[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = iter([100, 150, 151, 120, 160, 171, 171, 171])
    monkeypatch.setattr(heap, "_anonymous", lambda: next(held))
    giving_back = heap.GivingBack(50)
    giving_back()
    assert not calls
    giving_back()
    assert calls == [("malloc_trim", (0,))]
    giving_back()
    assert len(calls) == 1
    giving_back()
    assert len(calls) == 2


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what a process holds")
def test_what_a_process_holds_is_its_anonymous_memory() -> None:
    before = heap._anonymous()
    with mmap.mmap(-1, 2**24, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.write(b"x" * 2**24)
        assert 0.9 < (heap._anonymous() - before) / 2**24 < 2.5


@pytest.mark.skipif(heap._function("mallinfo2", heap._Use) is None, reason="this C library does not say what it uses")
@pytest.mark.parametrize("taken", [True, False])
def test_large_tensors_stand_alone_though_there_are_holes(taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use = heap._function("mallinfo2", heap._Use)
    assert use is not None
    if heap._is_tuned():
        pytest.skip("the environment sets the limits")
    if not taken:
        monkeypatch.setattr(heap, "_without_holes", nullcontext)
    with heap.keeping():
        blocks = [torch.ones(2**18) for _ in range(40)]
        del blocks[::2]
        with heap.thrifty():
            before = use().hblkhd
            tensors = [torch.ones(2**17) for _ in range(10)]
            alone = use().hblkhd - before
        assert all(float(own.min()) == float(own.max()) == 1 for own in [*blocks, *tensors])
    assert (alone >= 5 * 2**20) == taken
