"""The activation store's bandwidth beside a plain memory-mapped copy, and memory held against the budget
given.

Bandwidth is measured with embeddings of a model whose patches are small, so that there is little to compute
for many bytes. The files are in the page cache. Everything is read back and compared before it is timed. How
memory is measured is said in `benchmarks.store_memory`.

    python -m benchmarks.store --budget 256MiB
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
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
from benchmarks.store_memory import WAYS, gathered, held
from vit_mechinterp.engine.store import ActivationStore

PRESETS = {
    "full": {
        "examples": 1024, "repeats": 5, "budget": "256MiB", "vit_budget": "64MiB", "processes": 5,
        "ways": tuple(WAYS),
    },
    "small": {
        "examples": 256, "repeats": 3, "budget": "64MiB", "vit_budget": "64MiB", "processes": 1,
        "ways": ("experiment", "vit_tiny"),
    },
    "micro": {
        "examples": 16, "repeats": 1, "budget": "12MiB", "vit_budget": "12MiB", "processes": 1,
        "ways": ("experiment", "vit_tiny"),
    },
}  # fmt: skip
BYTES = Geometry(768, 1, 12, 64, image=56, patch=4)
"""600 kB of embeddings an image, at 15 MFLOP."""

BATCH = 32
_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


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
    order = np.random.default_rng(0).permutation(n)
    everything = np.arange(n)
    orders = {"in order": everything, "shuffled": order}
    host = ActivationStore(gpu=0, host=2 * n_bytes + 2**30)  # room for all, beside the batch at work
    held = host.capture(vit, data, "embed", batch_size=BATCH, progress=False)["embed"]
    for place, site in (
        ("disk", stores[-1].capture(vit, data, "embed", progress=False)["embed"]),
        ("host", held),
    ):
        check_read(place, site, plain, orders, chosen.torch_dtype)
    for _ in range(chosen.repeats):
        for name, way in ways.items():
            timed[name].append(seconds(way, device))
        for old in stores[:-1]:
            old.clear()
    _rows(report, "written, embeddings computed on the way", n_bytes, timed)
    alone = n_bytes / Spread.of(timed["computing"]).median / 1e9
    report.note(f"Computing the embeddings alone: {alone:.3g} GB/s.")

    disk = stores[-1].capture(vit, data, "embed", progress=False)["embed"]
    check_read("disk", disk, plain, orders, chosen.torch_dtype)
    for name, wanted_order in orders.items():
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


def check_read(
    place: str, site: Any, plain: np.ndarray, orders: Mapping[str, np.ndarray], dtype: torch.dtype
) -> None:
    """Assert that everything reads back bit by bit as it was written beside it, in every order."""
    for name, order in orders.items():
        for start in range(0, len(order), BATCH):
            chunk = order[start : start + BATCH]
            wanted = torch.from_numpy(plain[chunk])
            found = _tensor(site[chunk]).cpu()
            same = found.dtype == dtype and torch.equal(
                found.view(_INTEGERS[dtype]), wanted.view(_INTEGERS[dtype])
            )
            assert same, f"{place}, {name}: examples {start} to {start + len(chunk) - 1} read back otherwise"


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


def main(argv: list[str] | None = None) -> Report:
    """Measure bandwidth here, and memory in processes of their own."""
    parser = options.add(__doc__ or "")
    parser.add_argument(
        "--budget", help="memory that what streams over small images may hold, such as 128MiB"
    )
    parser.add_argument("--vit-budget", help="memory that a capture of an ordinary ViT may hold")
    parser.add_argument("--processes", type=int, help="how often memory is measured, each in its own process")
    parser.add_argument("--ways", nargs="*", choices=WAYS, help="whose memory is measured")
    parser.add_argument("--way", choices=WAYS, help="only this memory, once, in this process")
    chosen = options.parse(parser, PRESETS, argv)
    report = Report("store", "Activation store", chosen)
    report.sizes |= {name: getattr(chosen, name) for name in ("budget", "vit_budget", "processes")}
    if chosen.way is not None:
        held(report, chosen)
        report.finish()
        return report
    with tempfile.TemporaryDirectory() as folder:
        bandwidth(report, chosen, Path(folder))
    report.note(
        f"Embeddings of {BYTES.width} x {BYTES.patches + 1}, {BATCH} examples at a time. The store writes "
        "checksums and compares each when it first reads it from a file; the plain copy has none. Everything "
        "written was read back, in order and shuffled, from disk and from host memory, and compared bit by "
        "bit before it was timed; so the reads that are timed come after the comparison of checksums."
    )
    if chosen.torch_device.type == "cuda" or Path("/proc/self/status").exists():
        for way in chosen.ways:
            words = [*_words(chosen), "--way", way]
            report.add(gathered([isolated.part("benchmarks.store", words) for _ in range(chosen.processes)]))
    else:
        report.note("Memory held is not measured: this system does not say what a process holds.")
    report.finish()
    return report


def _words(chosen: Any) -> list[str]:
    words = ["--device", chosen.device, "--dtype", chosen.dtype]
    words += ["--budget", chosen.budget, "--vit-budget", chosen.vit_budget]
    words += [] if chosen.threads is None else ["--threads", str(chosen.threads)]
    return words if chosen.scale == "full" else [*words, f"--{chosen.scale}"]


if __name__ == "__main__":
    main()
