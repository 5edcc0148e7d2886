"""Parts of a benchmark in processes of their own, so that what one package changes on import or in the model
cannot touch another's timing. The unit is measured in that same process, beside what it divides.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Part, Row

__all__ = ["arguments", "available", "part"]


def available(package: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return importlib.util.find_spec(package) is not None


def arguments(options: Any) -> list[str]:
    """The shared options as a command line."""
    words = ["--model", options.model, "--examples", options.examples, "--repeats", options.repeats]
    words += ["--device", options.device, "--dtype", options.dtype]
    words += ["--tolerance", options.tolerance]
    if options.threads is not None:
        words += ["--threads", options.threads]
    if options.scale != "full":
        words.append(f"--{options.scale}")
    return [str(word) for word in words]


def part(module: str, words: Sequence[str]) -> Part:
    """Run ``python -m MODULE WORDS --json FILE`` and return the rows that it found, and its notes.

    Raises:
        RuntimeError: it failed; the message holds the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        command = [sys.executable, "-m", module, *words, "--json", str(file)]
        done = subprocess.run(  # noqa: S603
            command,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        record = json.loads(file.read_text())
        return Part([Row.from_record(row) for row in record["rows"]], record["notes"])
