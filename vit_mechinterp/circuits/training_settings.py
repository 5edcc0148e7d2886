"""Settings of trainings by gradient descent, checked before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vit_mechinterp.errors import SpecError

__all__ = ["check_settings"]


def check_settings(settings: object, counts: Sequence[str], numbers: Sequence[str]) -> None:
    """Raise SpecError unless the named attributes can be meant.

    Args:
        settings: has them.
        counts: those that are at least 1.
        numbers: those that are finite, and not negative.
    """
    for name in counts:
        if (value := getattr(settings, name)) < 1:
            raise SpecError(f"{name}={value}: training takes at least 1.")
    for name in numbers:
        if not 0 <= (value := getattr(settings, name)) < math.inf:
            raise SpecError(f"{name}={value}: it must be a finite number, 0 or more.")
