"""All benchmarks, each in a process of its own, and one table in the end.

python -m benchmarks --small
python -m benchmarks --device cuda --dtype bf16 --model vit_base --report benchmarks/results
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import options
from benchmarks.report import HEAD, Row, cells, table

BENCHMARKS = (
    "layer_sweep",
    "causal_tracing",
    "head_sweep",
    "mixed",
    "overheads",
    "das_training",
    "store",
    "scaling",
    "stimuli",
)
OWN_SIZES = ("store", "stimuli")
"""Benchmarks whose sizes are their own; ``--model``, ``--examples`` and ``--repeats`` are not passed on."""

ANYWHERE = ("stimuli",)
"""Benchmarks that run no model, and take nothing that says where or how: no ``--device``, ``--dtype``,
``--threads`` or ``--tolerance``."""


def words(name: str, chosen: Any) -> list[str]:
    """A benchmark's command line."""
    shared = ["report"]
    if name not in ANYWHERE:
        shared += ["device", "dtype", "threads", "tolerance"]
    if name not in OWN_SIZES:
        shared += ["model", "examples", "repeats"]
    found: list[str] = []
    for option in shared:
        if getattr(chosen, option) is not None:
            found += [f"--{option}", str(getattr(chosen, option))]
    return found if chosen.scale == "full" else [*found, f"--{chosen.scale}"]


def run_all(names: Iterable[str], chosen: Any) -> tuple[list[tuple[str, Row]], list[str]]:
    """Rows of every benchmark, and what failed."""
    rows: list[tuple[str, Row]] = []
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            begin = time.perf_counter()
            file = (chosen.json or Path(folder)) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", *words(name, chosen), "--json", str(file)]
            done = subprocess.run(  # noqa: S603
                command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
            )
            took = f"{time.perf_counter() - begin:.0f} s"
            if done.returncode == 0:
                record = json.loads(file.read_text())
                rows += [(name, Row.from_record(row)) for row in record["rows"]]
                print(f"{name}: {took}", flush=True)
            else:
                failed.append(name)
                print(f"{name} failed after {took}:\n{(done.stdout + done.stderr)[-2000:]}", flush=True)
    return rows, failed


def main(argv: list[str] | None = None) -> int:
    """Run them and print the table."""
    parser = options.add(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="only these")
    chosen = parser.parse_args(argv)
    rows, failed = run_all(chosen.only, chosen)
    print(table([("benchmark", *HEAD), *((name, *cells(row)) for name, row in rows)]))
    missed = sum(row.met is False for _, row in rows)
    met = sum(row.met is True for _, row in rows)
    print(f"{met} targets met, {missed} not; benchmarks/README.md explains them.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
