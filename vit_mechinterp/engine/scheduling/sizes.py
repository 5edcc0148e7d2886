"""Amounts of memory in words: ``"2GiB"`` and back."""

from __future__ import annotations

import math
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


def in_words(n_bytes: float, *, up: bool = False) -> str:
    """A number of bytes as people write it, to three digits.

    Args:
        n_bytes: the number.
        up: never say less than it is, so that `parse_bytes` gives enough.
    """
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1024:
            break
        n_bytes, unit = n_bytes / 1024, larger
    if up and n_bytes > 0:
        shift = 10 ** max(0, 2 - math.floor(math.log10(n_bytes)))
        n_bytes = math.ceil(n_bytes * shift) / shift
    # Of four digits before the point, as in 1010 KiB, three would be said as a power of ten.
    return f"{n_bytes:.0f} {unit}" if n_bytes >= 999.5 else f"{n_bytes:.3g} {unit}"
