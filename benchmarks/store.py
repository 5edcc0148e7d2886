"""The activation store's bandwidth beside a plain memory-mapped copy, and memory held against the budget
given.

Bandwidth is measured with embeddings of a model whose patches are small, so that there is little to compute
for many bytes. The files are in the page cache. Memory is measured in processes of their own, over a dataset
that is made image by image and is ten times the budget: anonymous memory above the level before, or the CUDA
allocator's peak.

    python -m benchmarks.store --budget 256MiB
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vit_mechinterp as vmi
from benchmarks import isolated, options
from benchmarks.measure import Spread, seconds
from benchmarks.models import Geometry, build, images
from benchmarks.report import Report, Row
from vit_mechinterp.engine.scheduling.sizes import in_words, parse_bytes
from vit_mechinterp.engine.store import ActivationStore

PRESETS = {
    "full": {"examples": 1024, "repeats": 5, "budget": "256MiB"},
    "small": {"examples": 512, "repeats": 3, "budget": "64MiB"},
    "micro": {"examples": 16, "repeats": 1, "budget": "12MiB"},
}
BYTES = Geometry(768, 1, 12, 64, image=56, patch=4)
"""600 kB of embeddings an image, at 15 MFLOP."""

STREAMED = Geometry(64, 4, 4, 256, image=96, patch=16)
"""Images of 110 kB, and 38 kB of block outputs for each."""

HELD = 1.1
BATCH = 32


@torch.no_grad()
def bandwidth(report: Report, chosen: Any, folder: Path) -> None:
    """Write and read embeddings, through the store and through one memory-mapped array."""
    module: Any = build(BYTES, device=chosen.device, dtype=chosen.torch_dtype)
    vit = vmi.wrap(module)
    data = {"base": images(module, chosen.examples, 0)}
    n, device = chosen.examples, chosen.torch_device
    shape = (n, BYTES.patches + 1, BYTES.width)
    n_bytes = int(np.prod(shape)) * chosen.torch_dtype.itemsize
    array = np.dtype(np.float32) if chosen.torch_dtype == torch.float32 else np.dtype(np.int16)
    plain = np.memmap(folder / "plain", dtype=array, mode="w+", shape=shape)

    def write_plain() -> None:
        for start in range(0, n, BATCH):
            rows = module.vit.embeddings(data["base"][start : start + BATCH]).cpu()
            plain[start : start + BATCH] = rows.view(_bits(rows.dtype)).numpy()
        plain.flush()

    def compute() -> None:
        for start in range(0, n, BATCH):
            module.vit.embeddings(data["base"][start : start + BATCH]).cpu()

    stores: list[ActivationStore] = []

    def write_store() -> None:
        stores.append(ActivationStore(folder / f"store{len(stores)}", gpu=0, host=0))
        stores[-1].capture(vit, data, "embed", batch_size=BATCH, progress=False)
        stores[-1].close()

    timed: dict[str, list[float]] = {"plain": [], "store": [], "computing": []}
    ways = {"plain": write_plain, "store": write_store, "computing": compute}
    for way in ways.values():
        way()
    for _ in range(chosen.repeats):
        for name, way in ways.items():
            timed[name].append(seconds(way, device))
        for old in stores[:-1]:
            old.clear()
    _rows(report, "written, embeddings computed on the way", n_bytes, timed)
    alone = n_bytes / Spread.of(timed["computing"]).median / 1e9
    report.note(f"Computing the embeddings alone: {alone:.3g} GB/s.")

    order = np.random.default_rng(0).permutation(n)
    host = ActivationStore(gpu=0, host=2 * n_bytes + 2**20)
    disk = stores[-1].capture(vit, data, "embed", progress=False)["embed"]
    held = host.capture(vit, data, "embed", batch_size=BATCH, progress=False)["embed"]
    for site in (disk, held):
        for start in (0, n - BATCH if n > BATCH else 0):
            chunk = order[start : start + BATCH]
            wanted = torch.from_numpy(plain[chunk]).view(chosen.torch_dtype)
            assert torch.equal(_tensor(site[chunk]).cpu(), wanted), "the store gave back something else"
    everything = np.arange(n)
    for name, wanted_order in (("in order", everything), ("shuffled", order)):
        readers: dict[str, Callable[[Any], object]] = {
            "plain": lambda chunk: torch.from_numpy(plain[chunk]).to(device),
            "store": lambda chunk: disk[chunk],
            "store, host memory": lambda chunk: held[chunk],
        }
        read: dict[str, list[float]] = {key: [] for key in readers}
        chunks = [wanted_order[i : i + BATCH] for i in range(0, n, BATCH)]
        for _ in range(chosen.repeats):
            for key, reader in readers.items():
                work = functools.partial(_each, reader, chunks)
                read[key].append(seconds(work, device))
        _rows(report, f"read {name}, {BATCH} examples at a time", n_bytes, read)
    host.close()
    stores[-1].clear()


def _each(reader: Callable[[Any], object], chunks: list[Any]) -> None:
    for chunk in chunks:
        reader(chunk)


def _rows(report: Report, what: str, n_bytes: int, timed: dict[str, list[float]]) -> None:
    names = {
        "plain": "memory-mapped copy",
        "store": "ActivationStore, disk",
        "store, host memory": "ActivationStore, host memory",
    }
    for key, taken in timed.items():
        if key in names:
            rate = Spread.of([n_bytes / t / 1e9 for t in taken])
            report.rows.append(Row(f"{what}: {names[key]}", rate, "GB/s", seconds=Spread.of(taken).median))


def _bits(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype == torch.bfloat16 else dtype


def _tensor(value: Tensor | list[Tensor]) -> Tensor:
    assert isinstance(value, Tensor)
    return value


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
    budget = parse_bytes(chosen.budget, "budget")
    module: Any = build(STREAMED, device=chosen.device, dtype=chosen.torch_dtype)
    vit = vmi.wrap(module)
    shape = (3, STREAMED.image, STREAMED.image)
    image = int(np.prod(shape)) * 4
    kept = STREAMED.layers * (STREAMED.patches + 1) * STREAMED.width * chosen.torch_dtype.itemsize
    n = 10 * budget // (2 * image if chosen.way == "experiment" else kept)
    n = min(n, 64) if chosen.scale == "micro" else n
    swap = vmi.Interchange(site="blocks.0.resid_post", tokens=[0, 5], source="source")
    runs = [vmi.Run(name=f"layer{k}", interventions=[swap.at(layer=k)]) for k in range(STREAMED.layers)]

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
    name = "an experiment" if chosen.way == "experiment" else "a capture to disk"
    report.rows.append(
        Row(
            f"memory held by {name}, data ten times the budget", Spread.of([watch.bytes / budget]),
            "of the budget", target=HELD,
        )
    )  # fmt: skip
    report.note(
        f"{name}: budget {in_words(budget)}, {n} examples (images of {in_words(image)}; a capture keeps "
        f"{in_words(kept)} of each), peak {in_words(watch.bytes)} above the level before."
    )


def main(argv: list[str] | None = None) -> Report:
    """Measure bandwidth here, and memory in processes of their own."""
    parser = options.add(__doc__ or "")
    parser.add_argument("--budget", help="memory that an experiment may hold, such as 128MiB")
    parser.add_argument("--way", choices=("experiment", "capture"), help="only this memory, in this process")
    chosen = options.parse(parser, PRESETS, argv)
    report = Report("store", "Activation store", chosen)
    report.sizes["budget"] = chosen.budget
    if chosen.way is not None:
        held(report, chosen)
        report.finish()
        return report
    with tempfile.TemporaryDirectory() as folder:
        bandwidth(report, chosen, Path(folder))
    if chosen.torch_device.type == "cuda" or Path("/proc/self/status").exists():
        chosen.model = None
        words = ["--device", chosen.device, "--dtype", chosen.dtype, "--budget", chosen.budget]
        words += [] if chosen.threads is None else ["--threads", str(chosen.threads)]
        words += [] if chosen.scale == "full" else [f"--{chosen.scale}"]
        for way in ("experiment", "capture"):
            report.rows += isolated.part("benchmarks.store", [*words, "--way", way])
    else:
        report.note("Memory held is not measured: this system does not say what a process holds.")
    report.note(
        f"Embeddings of {BYTES.width} x {BYTES.patches + 1}, {BATCH} examples at a time. The store writes "
        "checksums and compares each when it first reads it from a file; the plain copy has none. Two "
        "batches of what each gives were compared bit by bit."
    )
    report.finish()
    return report


if __name__ == "__main__":
    main()
