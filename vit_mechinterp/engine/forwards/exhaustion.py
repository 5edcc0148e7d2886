"""What to do when memory runs out: halve the rows per forward, say so in one line, and go on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.model.out_of_memory import memory_may_run_out

__all__ = ["in_fewer_rows", "make_room"]

Found = TypeVar("Found")

logger = logging.getLogger(__name__)


def in_fewer_rows(call: Callable[[int], Found], rows: int) -> Found:
    """What ``call`` gives with so many rows per forward, or half of them as often as memory runs out.

    Raises:
        ExecutionError: one row does not fit.
    """
    while True:
        with memory_may_run_out():
            return call(rows)
        rows = make_room(rows)


def make_room(rows: int) -> int:
    """Half as many rows per forward, to be called once the frames of the failed forward are gone.

    Raises:
        ExecutionError: one row does not fit.
    """
    if rows == 1:
        raise ExecutionError(
            "Out of memory with one row per forward: the model does not fit with its activations and what is "
            "held beside them. Hold less (a smaller memory=, where it is given), compute in half precision "
            "(vit.module.half()), or move the model to a device with more memory."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    logger.warning("Out of memory at %d rows per forward: going on with %d.", rows, rows // 2)
    return rows // 2
