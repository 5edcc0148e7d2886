"""Memory that an experiment or a capture holds against its budget: part of `store`.

Each is measured in a process of its own, over a dataset that is made image by image and is ten times the
budget: anonymous memory above the level before, or the CUDA allocator's peak.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vit_mechinterp as vmi
from benchmarks.measure import Spread
from benchmarks.models import SIZES, Geometry, build
from benchmarks.report import Part, Report, Row
from vit_mechinterp.engine.scheduling.sizes import in_words, parse_bytes
from vit_mechinterp.engine.store import ActivationStore

__all__ = ["WAYS", "Drawn", "Watch", "gathered", "held"]

STREAMED = Geometry(64, 4, 4, 256, image=96, patch=16)
"""Images of 110 kB, and 38 kB of block outputs for each."""

WAYS = {
    "experiment": ("an experiment", STREAMED),
    "capture": ("a capture to disk", STREAMED),
    "vit_tiny": ("a capture of ViT-Ti/16 to disk", SIZES["vit_tiny"]),
    "vit_small": ("a capture of ViT-S/16 to disk", SIZES["vit_small"]),
}
"""What is measured, and on which model: a small one, or an ordinary one. Captures keep all block outputs."""

HELD = 1.1


class Drawn:
    """A column of images that are drawn when they are asked for, the same ones every time; it holds
    nothing."""

    def __init__(self, n: int, shape: tuple[int, ...], seed: int) -> None:
        self.n, self.shape, self.seed = n, shape, seed

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed * self.n + int(index))
        return torch.randn(self.shape, generator=draw)


class Watch:
    """The most memory held inside the ``with`` block above the level before it, in ``bytes``.

    On a CPU the process's anonymous memory, looked at every millisecond; on a GPU the allocator's peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._done = threading.Event()

    def __enter__(self) -> Watch:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._level = torch.cuda.memory_allocated(self.device)
        else:
            self._level = _anonymous()
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._level
            return
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, _anonymous() - self._level)

    def _look(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, _anonymous() - self._level)
            time.sleep(1e-3)


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much anonymous memory a process holds")


def _give_back() -> None:
    """Return freed memory to the system, so that the level before does not count what is only kept for
    later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def held(report: Report, chosen: Any) -> None:
    """Peak memory of an experiment or of a capture, over the budget."""
    what, geometry = WAYS[chosen.way]
    ordinary = chosen.way in SIZES
    budget = parse_bytes(chosen.vit_budget if ordinary else chosen.budget, "budget")
    module: Any = build(geometry, device=chosen.device, dtype=chosen.torch_dtype)
    vit = vmi.wrap(module)
    shape = (3, geometry.image, geometry.image)
    image = int(np.prod(shape)) * 4
    kept = geometry.layers * (geometry.patches + 1) * geometry.width * chosen.torch_dtype.itemsize
    each = 2 * image if chosen.way == "experiment" else kept
    n = 10 * budget // each
    n = min(n, 16 if ordinary else 64) if chosen.scale == "micro" else n
    swap = vmi.Interchange(site="blocks.0.resid_post", tokens=[0, 5], source="source")
    runs = [vmi.Run(name=f"layer{k}", interventions=[swap.at(layer=k)]) for k in range(geometry.layers)]

    def columns(n: int) -> dict[str, Any]:
        return {"base": Drawn(n, shape, 1), "source": Drawn(n, shape, 2)}

    def experiment(n: int) -> object:
        return vmi.execute(vit, runs, columns(n), memory=budget, progress=False)

    def capture(n: int, folder: str) -> object:
        with ActivationStore(folder, gpu=budget, host=budget) as store:
            return store.capture(vit, columns(n), "blocks.*.resid_post", progress=False)

    with tempfile.TemporaryDirectory() as folder:
        work = experiment if chosen.way == "experiment" else functools.partial(capture, folder=folder)
        with tempfile.TemporaryDirectory() as first:
            # What a first forward loads and keeps belongs to the level before.
            experiment(8) if chosen.way == "experiment" else capture(8, first)
        _give_back()
        with Watch(chosen.torch_device) as watch:
            work(n)
    name = f"memory held by {what}, data {n * each / budget:.2g} times the budget"
    report.rows.append(
        Row(
            name, Spread.of([watch.bytes / budget]), "of the budget", target=HELD, peak_bytes=watch.bytes,
        )
    )  # fmt: skip
    report.note(
        f"{name}: budget {in_words(budget)}, {n} examples (images of {in_words(image)}; a capture keeps "
        f"{in_words(kept)} of each)."
    )


def gathered(parts: Sequence[Part]) -> Part:
    """The same measurement of several processes as one row, and its sentences once."""
    (first, *_), *_ = [part.rows for part in parts]
    peaks = [row.peak_bytes or 0 for part in parts for row in part.rows]
    value = Spread.of([row.value.median for part in parts for row in part.rows])
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    return Part([dataclasses.replace(first, value=value, peak_bytes=max(peaks))], notes)
