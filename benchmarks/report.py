"""What a benchmark found: rows with their configuration, as a table on the screen, JSON and Markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import Spread, Timed

__all__ = ["HEAD", "Part", "Report", "Row", "cells", "configuration", "host_kind", "table"]

_PACKAGES = ("torch", "transformers", "timm", "numpy", "transformer-lens", "nnsight", "pyvene")


@dataclass(frozen=True)
class Row:
    """One measured way.

    Attributes:
        name: what was measured.
        value: the spread of the figure.
        unit: what the figure counts: ``forwards`` are multiples of one plain native forward of the same
        images.
        seconds: median wall time, where there is one.
        bound: the same figure as the arithmetic allows it.
        target: what the figure should be at most (``at_least``: at least).
        at_least: larger is better.
        or_contains: a figure that the interval may contain instead of meeting the target.
        interventions: (run, example) rows a second.
        of_plain: interventions a second over images a second of the plain forward.
        peak_bytes: most bytes of the CUDA allocator; where memory is what is measured, the most held above
            the level before.
    """

    name: str
    value: Spread
    unit: str = "forwards"
    seconds: float | None = None
    bound: float | None = None
    target: float | None = None
    at_least: bool = False
    or_contains: float | None = None
    interventions: float | None = None
    of_plain: float | None = None
    peak_bytes: int | None = None

    @classmethod
    def timed(
        cls,
        name: str,
        timed: Timed,
        *,
        rows: int = 0,
        unit_images: int = 0,
        scale: float = 1.0,
        **fields: Any,
    ) -> Row:
        """A row from timings.

        Args:
            rows: (run, example) rows that one call computes; 0 where the way is no intervention.
            unit_images: images of one unit.
            scale: the figure is units times this.
        """
        spread = Spread.of([scale * u for u in timed.units])
        taken = sorted(timed.seconds)[len(timed.seconds) // 2]
        per_unit = Spread.of(timed.units).median
        if rows:
            fields["interventions"] = rows / taken
            fields["of_plain"] = rows / (per_unit * unit_images)
        return cls(name, spread, seconds=taken, peak_bytes=timed.peak_bytes, **fields)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target, or the interval holds what it may hold instead."""
        if self.target is None:
            return None
        if self.or_contains is not None and self.value.low <= self.or_contains <= self.value.high:
            return True
        return self.value.median >= self.target if self.at_least else self.value.median <= self.target

    def record(self) -> dict[str, Any]:
        """The row as JSON."""
        return asdict(self) | {"met": self.met}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Row:
        """The row that `record` wrote."""
        fields = {key: value for key, value in record.items() if key != "met"}
        return cls(**fields | {"value": Spread(**fields["value"])})


class Part(NamedTuple):
    """What was measured in a process of its own: rows, and the sentences that belong to them."""

    rows: list[Row]
    notes: list[str]


@dataclass
class Report:
    """A benchmark's rows with what they were measured on."""

    benchmark: str
    title: str
    options: Any
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = configuration(self.options) | self.sizes

    def note(self, *lines: str) -> None:
        """Add sentences that belong beside the figures."""
        self.notes.extend(lines)

    def add(self, part: Part) -> None:
        """Add the rows and sentences of a part."""
        self.rows += part.rows
        self.notes += part.notes

    def finish(self) -> None:
        """Print the table, and write JSON and Markdown where the options say."""
        print(f"{self.title}\n{self._configured()}")
        print(table([HEAD, *map(cells, self.rows)]))
        for note in self.notes:
            print(f"  {note}")
        if self.options.json is not None:
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            self.options.json.write_text(json.dumps(self.record(), indent=1) + "\n")
        if self.options.report is not None:
            self.options.report.mkdir(parents=True, exist_ok=True)
            kind = host_kind(self.options.torch_device)
            parts = [datetime.date.today(), kind, self.benchmark, self.options.model, self.options.dtype]
            name = "-".join(str(part) for part in parts if part is not None)
            (self.options.report / f"{name}.md").write_text(self.markdown())

    def record(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "benchmark": self.benchmark,
            "title": self.title,
            "date": str(datetime.date.today()),
            "command": _command(self.benchmark),
            "configuration": self.sizes,
            "rows": [row.record() for row in self.rows],
            "notes": self.notes,
            "curves": self.curves,
        }

    def markdown(self) -> str:
        """A report for `benchmarks/results`."""
        today = datetime.date.today()
        lines = [f"# {self.title}", "", f"{today:%-d %B %Y}: `{_command(self.benchmark)}`", ""]
        lines += ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in self.rows]
        lines += ["", *(f"* {note}" for note in self.notes), "", "Configuration:", ""]
        lines += [f"* {key}: {value}" for key, value in self.sizes.items()]
        return "\n".join(lines) + "\n"

    def _configured(self) -> str:
        return "\n".join(f"  {key}: {value}" for key, value in self.sizes.items())


HEAD = (
    "way", "figure", "unit", "quartiles", "95 % interval", "bound", "target", "met", "seconds",
    "interventions/s", "of plain", "peak",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    def number(x: float | None, form: str = ".3g") -> str:
        return "" if x is None else format(x, form)

    v = row.value
    sign = "at least" if row.at_least else "at most"
    return [
        row.name,
        f"{v.median:.4g}",
        row.unit,
        f"{v.q1:.4g} to {v.q3:.4g}",
        f"{v.low:.4g} to {v.high:.4g}",
        number(row.bound, ".4g"),
        "" if row.target is None else f"{sign} {row.target:.4g}",
        "" if row.met is None else ("yes" if row.met else "no"),
        number(row.seconds),
        number(row.interventions),
        number(row.of_plain),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB",
    ]


def table(rows: list[Iterable[str]]) -> str:
    """Aligned columns; columns that are empty but for their heading are left out."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        [cell.ljust(width) if n == 0 else cell.rjust(width) for cell in column]
        for n, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return "\n".join("  " + "  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def _command(benchmark: str) -> str:
    arguments = [a for a in sys.argv[1:] if not a.startswith("--json")]
    return " ".join(["python -m", f"benchmarks.{benchmark}", *arguments])


def configuration(options: Any) -> dict[str, Any]:
    """Hardware, versions and options, as far as they bear on the figures."""
    device = options.torch_device
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load average before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": _commit(),
        "dtype": options.dtype,
        "scale": options.scale,
    }
    if device.type == "cuda":
        found["CUDA"] = torch.version.cuda
    for name in ("model", "examples", "repeats"):
        if getattr(options, name, None) is not None:
            found[name] = getattr(options, name)
    return found


def host_kind(device: torch.device) -> str:
    """A short name of the hardware for file names: ``cpu-x86_64-2-threads`` or ``nvidia-h100-80gb-hbm3``."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"cpu-{platform.machine().lower()}-{torch.get_num_threads()}-threads"


def _commit() -> str | None:
    """The commit that is measured, and whether something was changed since; None outside a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()
