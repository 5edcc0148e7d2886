"""Large blocks go back to the system at once while somebody asks for it, and only then."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vit_mechinterp.engine import heap

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Of glibc's ``malloc.h``."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """What the C library is asked for."""
    made: list[tuple[str, tuple[int, ...]]] = []

    def function(name: str, *_: type) -> Callable[..., int]:
        return lambda *arguments: made.append((name, arguments)) or 1  # type: ignore[func-returns-value]

    monkeypatch.setattr(heap, "_function", function)
    monkeypatch.setattr(heap.os, "environ", {})
    return made


def limits(calls: list[tuple[str, tuple[int, ...]]]) -> list[tuple[int, ...]]:
    return [arguments for name, arguments in calls if name == "mallopt"]


def test_the_first_lowers_the_limit_and_the_last_raises_it(calls: list[tuple[str, tuple[int, ...]]]) -> None:
    with heap.thrifty():
        assert limits(calls) == [(MMAP_THRESHOLD, 128 * 2**10)]
        with heap.thrifty():
            pass
        assert limits(calls) == [(MMAP_THRESHOLD, 128 * 2**10)]
        assert calls[-1] == ("malloc_trim", (0,))
    assert limits(calls)[1:] == [(MMAP_THRESHOLD, 32 * 2**20), (TRIM_THRESHOLD, 64 * 2**20)]


def test_the_limit_is_raised_after_an_exception(calls: list[tuple[str, tuple[int, ...]]]) -> None:
    with pytest.raises(KeyboardInterrupt), heap.thrifty():
        raise KeyboardInterrupt
    assert limits(calls)[-1] == (TRIM_THRESHOLD, 64 * 2**20)


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_limits_from_outside_are_left_alone(
    calls: list[tuple[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(heap.os, "environ", {name: "1"})
    with heap.thrifty():
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
