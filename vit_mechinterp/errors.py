"""Every error that the package raises on purpose.

VitMechInterpError
├── SpecError               a spec is malformed, or does not fit the model (also a ValueError), in a document
│   │                       or made in Python: pydantic's ValidationError is turned into it
│   └── UnsupportedSiteError    the model has no such site, and why
├── DataError               a dataset lacks a column, or a column has the wrong content (also a ValueError)
├── TensorFileError         a tensor file is missing, unreadable, truncated or not what its reference says
├── UnsupportedModelError   no adapter recognises a module: what was probed and what was missing
└── ExecutionError          a run could not be carried out as planned

A message says what happened, where, what was available, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataError",
    "ExecutionError",
    "SpecError",
    "TensorFileError",
    "UnsupportedModelError",
    "UnsupportedSiteError",
    "VitMechInterpError",
    "listed",
    "suggest",
]


class VitMechInterpError(Exception):
    """The root of the tree; catch it to catch everything below."""


class SpecError(VitMechInterpError, ValueError):
    """A spec is malformed, or does not fit the model it is to run on."""


class UnsupportedSiteError(SpecError):
    """A site exists in the vocabulary, but not in this model (or not writable there)."""


class DataError(VitMechInterpError, ValueError):
    """A dataset lacks a column, or a column holds something else than what was asked of it."""


class TensorFileError(VitMechInterpError, OSError):
    """A tensor file is missing, unreadable, truncated, or differs from the hash in its reference."""


class UnsupportedModelError(VitMechInterpError, TypeError):
    """No adapter recognises a module."""


class ExecutionError(VitMechInterpError, RuntimeError):
    """A run could not be carried out as planned."""


def suggest(name: str, options: Iterable[str], *, limit: int = 3) -> str:
    """Return ``" Close matches: a, b."`` for the options nearest to ``name``, or an empty string."""
    close = difflib.get_close_matches(str(name), list(options), n=limit, cutoff=0.6)
    return f" Close matches: {', '.join(close)}." if close else ""


def listed(names: Iterable[str], *, most: int = 12, between: str = ", ") -> str:
    """Return names in a row, and of many only the first and how many more there are."""
    every = list(names)
    return between.join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
