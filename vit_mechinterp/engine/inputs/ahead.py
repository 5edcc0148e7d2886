"""Images decoded and preprocessed in the background, so that the model need not wait for them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import dropwhile

from torch import Tensor

__all__ = ["AHEAD_BYTES", "Ahead", "Request", "workers_for"]

Request = tuple[str, tuple[int, ...]]
"""An image column, and the examples of one forward."""

AHEAD_BYTES = 256 * 1024**2
"""Bytes of preprocessed images that wait at most, unless something else is asked for."""


class Ahead:
    """Makes batches in the order in which they will be asked for, a few at a time.

    Requests that are passed over are left out. Whatever is asked for out of order is left to the caller, and
    nothing more is made ahead. The batches are those that the caller would make, one call of ``make`` each,
    so the results are the same bits.

    Args:
        make: makes the batch of one request.
        requests: what will be asked for, in order.
        nbytes: bytes of one image as the model takes it.
        workers: number of threads; decoding and resizing let other threads run.
        most: most bytes of preprocessed images that wait; one batch may wait however large it is.
    """

    def __init__(
        self,
        make: Callable[[str, Sequence[int]], Tensor],
        requests: Iterable[Request],
        nbytes: int,
        workers: int,
        most: int = AHEAD_BYTES,
    ) -> None:
        self._make = make
        self._requests = iter(requests)
        self._nbytes = nbytes
        self._depth = workers + 1
        self._most = most
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
        self._waiting: deque[tuple[Request, Future[Tensor]]] = deque()
        self._fill()

    def _fill(self) -> None:
        held = sum(len(examples) for (_, examples), _ in self._waiting) * self._nbytes
        while len(self._waiting) < self._depth and (not self._waiting or held < self._most):
            request = next(self._requests, None)
            if request is None:
                return
            held += len(request[1]) * self._nbytes
            self._waiting.append((request, self._pool.submit(self._make, *request)))

    def take(self, column: str, examples: Sequence[int]) -> Tensor | None:
        """The batch, if it is the next one; otherwise None.

        Raises:
            DataError: as ``make`` does.
        """
        if not self._waiting:
            return None
        wanted = column, tuple(examples)
        while self._waiting and self._waiting[0][0] != wanted:
            # What comes before it is not asked for any more: another process has computed it.
            self._waiting.popleft()[1].cancel()
            if not self._waiting:
                self._requests = dropwhile(lambda request: request != wanted, self._requests)
                self._fill()
        if not self._waiting:
            self.close()
            return None
        _, future = self._waiting.popleft()
        batch = future.result()
        self._fill()
        return batch

    def close(self) -> None:
        """Make nothing more, and wait for what is being made."""
        self._requests = iter(())
        self._waiting.clear()
        self._pool.shutdown(cancel_futures=True)


def workers_for(device_type: str, *, shared: bool) -> int:
    """Threads that make images: few beside a model on the CPU, which needs the cores itself.

    ``shared`` says that entries are objects of the caller's, which two threads must not decode at once.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if shared or device_type == "cpu" else max(1, min(8, cores // 2))
