"""A budget given is a budget kept: ten times as many activations as may be held, and pixels beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("what", ["execute", "capture", "sweep", "means", "prepare", "wide", "small"])
def test_a_run_over_ten_times_the_budget_stays_under_it(tmp_path: Path, what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.budgeted", str(tmp_path), what],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pixels"] > (9.9 if what not in ("wide", "small") else 3)
    assert found["activations"] > 9.9
    assert 0.1 < found["risen"] < 1.1  # what is measured is there, and within the budget
