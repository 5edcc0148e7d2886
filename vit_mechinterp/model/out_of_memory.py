"""Memory that runs out, in the words of whoever ran out of it: the host, a GPU, or a library on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["memory_may_run_out"]

_WORDS = (
    "can't allocate memory",  # the host, by torch
    "not enough memory",
    "out of memory",  # a GPU, outside of torch's own allocator
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN and their like, which allocate by themselves
)


@contextmanager
def memory_may_run_out() -> Iterator[None]:
    """Leave the ``with`` block quietly where memory runs out in it, on a GPU or on the host."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if not any(words in str(error) for words in _WORDS):
            raise
