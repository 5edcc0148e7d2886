"""Amounts of memory in words: ``"2GiB"`` and back."""

from __future__ import annotations

import re

from vit_mechinterp.errors import SpecError

__all__ = ["in_words", "parse_bytes"]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{end}": 1000**n for n, letter in enumerate("kmgt", 1) for end in ("", "b")}
_UNITS |= {f"{letter}ib": 1024**n for n, letter in enumerate("kmgt", 1)}


def parse_bytes(amount: int | float | str, name: str = "memory") -> int:
    """Bytes that an amount means: a number of bytes, or a text such as ``"512MiB"`` or ``"1.5 GB"``.

    Args:
        amount: the amount; ``KiB`` is 1024 bytes, ``kB`` is 1000.
        name: the parameter that it was given for, for messages.

    Raises:
        SpecError: it is negative, or no amount.
    """
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", amount)
        if match is not None and match[2].lower() in _UNITS:
            return int(float(match[1]) * _UNITS[match[2].lower()])
    elif isinstance(amount, (int, float)) and not isinstance(amount, bool) and 0 <= amount < float("inf"):
        return int(amount)
    raise SpecError(f"{name}={amount!r} is no amount of memory; write bytes, or a text such as '512MiB'.")


def in_words(n_bytes: float) -> str:
    """A number of bytes as people write it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} TiB"
