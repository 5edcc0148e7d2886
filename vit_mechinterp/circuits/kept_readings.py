"""What circuits read off a model, batch by batch, kept so that one that was stopped goes on where it was.

A circuit that only reads goes through its images a few at a time and holds some tensors of each batch. With a
folder they are written every half minute, and once more whatever ends the circuit. The same call finds them:
same model, same images, same options. Other calls find nothing of it, and may share the folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.circuits.kept_tensors import KeptTensors
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.inputs.entries import bytes_of
from vit_mechinterp.engine.results.provenance import versions
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec.digest import digest

__all__ = ["KeptReadings", "in_batches"]

_SECONDS = 30.0
"""Work between two writes to disk."""
_BYTES = 64 * 1024**2
"""Tensors that wait to be written at most."""
_AT_ONCE = 8
_ACTIVATIONS = 2**29
"""Bytes of activations that a batch may hold."""


class KeptReadings:
    """Tensors by what was read; without a folder nothing is kept.

    A context manager: what waits to be written is written when the block ends, whatever ends it.

    Args:
        folder: where, or None.
        vit: the model.
        columns: the examples.
        images: the image columns that are read.
        decided_by: what else decides the numbers: names, numbers, tensors, and lists of them.

    Raises:
        ExecutionError: nothing can be written there.
    """

    def __init__(
        self,
        folder: str | Path | None,
        vit: HookedViT,
        columns: Data,
        images: Sequence[str],
        **decided_by: Any,
    ) -> None:
        self._kept = None if folder is None else KeptTensors(folder)
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._written = time.monotonic()
        if self._kept is not None:
            self._key = digest(
                {
                    "model": vit.fingerprint(),
                    "dtype": vit.precision,
                    "images": {column: columns.image_digest(column) for column in images},
                    "decided by": _plain(decided_by),
                    "version": versions(("vit-mechinterp",)).get("vit-mechinterp"),
                }
            )

    def once(self, what: Any, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return what was kept of ``what``, or make it and keep it.

        Raises:
            ExecutionError: it cannot be written.
        """
        if self._kept is None:
            return dict(make())
        key = digest([self._key, _plain(what)])
        if key in self._waiting:
            return dict(self._waiting[key])
        if key in self._kept:
            return self._kept.load(key)
        # Cloned, so that nothing that waits holds on to the activations that it is a part of.
        made = {name: tensor.detach().cpu().clone() for name, tensor in make().items()}
        self._waiting[key] = made
        nbytes = sum(tensor.nbytes for group in self._waiting.values() for tensor in group.values())
        if nbytes > _BYTES or time.monotonic() - self._written > _SECONDS:
            self._write()
        return dict(made)

    def _write(self) -> None:
        if self._kept is not None and self._waiting:
            self._kept.save(self._waiting)
        self._waiting = {}
        self._written = time.monotonic()

    def __enter__(self) -> KeptReadings:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()


def in_batches(
    vit: HookedViT,
    n: int,
    read: Callable[[list[int]], Mapping[str, Tensor]],
    kept: KeptReadings,
    *,
    at_once: int | None = None,
    sites: Sequence[str] = (),
    progress: bool = True,
    what: str = "images",
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Go through examples a few at a time, and read those that were not kept.

    Batches are the same on every start, so that what is read anew has the bits of what was kept.

    Args:
        vit: the model; one that takes an image at a time is given no more.
        n: number of examples.
        read: turns examples into tensors by name, on any device.
        kept: where they are kept; the block of its context manager should surround the loop.
        at_once: examples of a batch; by default 8, and fewer where ``sites`` are large.
        sites: what is captured of a batch.
        progress: show a bar if it takes longer than two seconds.
        what: what the bar counts.
    """
    nbytes = sum(prod(vit.sites()[site].shape) for site in sites) * vit.dtype.itemsize
    at_once = at_once or min(_AT_ONCE, max(1, _ACTIVATIONS // max(nbytes, 1)))
    if getattr(vit.layout.family, "one_image", None) is not None:
        at_once = 1
    spans = [list(range(first, min(first + at_once, n))) for first in range(0, n, at_once)]
    for examples in tqdm(spans, desc=what, unit="batch", delay=2.0, disable=not progress):
        yield examples, kept.once(examples, partial(read, examples))


def _plain(value: Any) -> Any:
    """What JSON can hold of anything that decides a number; tensors by their contents."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(item) for item in value]
    if hasattr(value, "dtype"):
        return sha256(bytes_of(value)).hexdigest()
    return str(value)
