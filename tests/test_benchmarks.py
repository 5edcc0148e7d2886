"""Every benchmark runs at its smallest size; each asserts by itself that all ways agree. No time is asserted."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import isolated, options
from benchmarks.__main__ import BENCHMARKS, words
from benchmarks.measure import Spread, Timed, interleaved
from benchmarks.models import build, pairs
from benchmarks.plain import Plain, agree, tell_apart
from benchmarks.report import Part, Report, Row

ROOT = Path(__file__).parents[1]
IN_PROCESS = [name for name in BENCHMARKS if name not in ("layer_sweep", "das_training")]


def _run(name: str, *words: str) -> Report:
    main = importlib.import_module(f"benchmarks.{name}").main
    report: Report = main(["--micro", *words])
    return report


@pytest.mark.parametrize("name", IN_PROCESS)
def test_benchmark_runs_and_writes(name: str, tmp_path: Path) -> None:
    report = _run(name, "--json", str(tmp_path / "found.json"), "--report", str(tmp_path))
    assert report.rows
    record = json.loads((tmp_path / "found.json").read_text())
    assert [Row.from_record(row) for row in record["rows"]] == report.rows
    assert {"device", "threads", "versions", "dtype"} <= set(record["configuration"])
    (page,) = tmp_path.glob("*.md")
    assert page.name.startswith(record["date"])
    assert report.rows[0].name in page.read_text()


def test_mixed_in_bfloat16() -> None:
    assert _run("mixed", "--dtype", "bf16").rows


@pytest.mark.parametrize("way", ["vit_mechinterp", "hooks"])
def test_layer_sweep(way: str) -> None:
    assert _run("layer_sweep", "--way", way).rows


@pytest.mark.parametrize("way", ["transformer_lens", "nnsight", "pyvene"])
def test_layer_sweep_of_a_peer(way: str, tmp_path: Path) -> None:
    package = importlib.import_module("benchmarks.layer_sweep").WAYS[way]
    if not isolated.available(package):
        pytest.skip(f"{package} is not installed")
    part = isolated.part("benchmarks.layer_sweep", ["--micro", "--way", way])
    assert part.rows
    assert all(row.value.median > 0 for row in part.rows)


def test_das_training_without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    das_training = importlib.import_module("benchmarks.das_training")
    monkeypatch.setattr(das_training, "PEERS", {})
    report = _run("das_training")
    curves = report.curves["all 3 layers"]
    assert len(curves["ours"]) == len(curves["other"]) == 3


def test_trainings_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    das_training, das_steps = (
        importlib.import_module(f"benchmarks.das_{name}") for name in ("training", "steps")
    )
    step, timed = das_steps.Trainer.step, []

    def scaled(trainer: Any) -> Any:
        return step(trainer) * (1 + 2e-5 * inspect.isfunction(trainer.forward))

    monkeypatch.setattr(das_steps.Trainer, "step", scaled)
    monkeypatch.setattr(das_training, "step_by_step", lambda *a: timed.append(a))
    with pytest.raises(
        AssertionError, match=r"layer 0, float64: learning curves differ by 2e-05, more than 1e-05"
    ):
        _run("das_training")
    assert timed == []


@pytest.mark.parametrize("way", ["transformer_lens", "pyvene"])
def test_das_training_of_a_peer(way: str) -> None:
    if not isolated.available(way):
        pytest.skip(f"{way} is not installed")
    words = ["--micro", "--batch", "2", "--layers", "0", "--way", way]
    rows, notes = isolated.part("benchmarks.das_peers", words)
    names = ["layer 0, against pyvene", "all 3 layers, against pyvene"]
    assert [row.name for row in rows] == (
        names if way == "pyvene" else ["layer 0, against TransformerLens fit_das"]
    )
    assert all("in float64" in note for note in notes)


def test_the_bound_of_das_training() -> None:
    bound = importlib.import_module("benchmarks.das_training").bound
    assert bound([0], 12) == pytest.approx((24 + 11) / 22)
    assert bound(range(12), 12) == pytest.approx(2.68, abs=0.005)


def test_a_wrong_way_is_found() -> None:
    module: Any = build("micro")
    data = pairs(module, 2)
    plain = Plain(module, data)
    swap = {
        "op": "interchange", "site": "blocks.0.resid_post", "tokens": {"column": "edited"}, "source": "source",
        "source_tokens": {"column": "source_tokens"},
    }  # fmt: skip
    wanted, clean = plain.run({"interventions": [swap]}), plain.clean("base")
    shifted = plain.run({"interventions": [swap | {"source_tokens": {"column": "edited"}}]})
    with pytest.raises(AssertionError, match=r"way: differs by"):
        agree("way", shifted, wanted, 1e-5)
    with pytest.raises(AssertionError, match=r"way: a mean error"):
        tell_apart("way", clean, wanted, clean)


def test_a_failed_part_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"invalid choice: 'nobody'"):
        isolated.part("benchmarks.layer_sweep", ["--way", "nobody"])


def test_all_of_them_in_one_table() -> None:
    command = [sys.executable, "-m", "benchmarks", "--micro", "--only", "mixed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 runs" in done.stdout


def test_what_is_passed_on() -> None:
    parser = options.add("")
    chosen = parser.parse_args(["--device", "cuda", "--model", "vit_base", "--examples", "8", "--small"])
    model = ["--model", "vit_base", "--examples", "8"]
    assert words("scaling", chosen) == ["--device", "cuda", "--dtype", "fp32", *model, "--small"]
    assert words("store", chosen) == ["--device", "cuda", "--dtype", "fp32", "--small"]
    assert words("stimuli", chosen) == ["--small"]


def test_sizes_of_scaling() -> None:
    scaling = importlib.import_module("benchmarks.scaling")
    found = scaling.sizes(100_000, 12, (3, 6, 12, 24), runs=20, examples=50)
    assert found["runs"][-1] == (2000, 50, 12)
    assert found["examples"][-1] == (20, 5000, 12)
    assert [depth for *_, depth in found["layers"]] == [3, 6, 12, 24]
    runs, examples, depth = found["layers"][-1]
    assert runs * examples * (depth - 1) / 2 == pytest.approx(100_000 * 11 / 2, rel=0.05)


def test_scaling_of_any_model() -> None:
    report = _run(
        "scaling", "--model", "vit_cifar", "--examples", "4", "--layers", "2", "--depths", "2", "3", "4"
    )
    assert [point["layers"] for point in report.curves["layers"]] == [2, 3, 4]
    assert {point["layers"] for point in report.curves["runs"]} == {2}
    assert {point["examples"] for point in report.curves["runs"]} == {4}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["--rows", "100"], "give 200 or more"),
        (["--depths", "2", "4"], "three or more sizes"),
        (["--layers", "1"], "must be 2 or more"),
    ],
)
def test_sizes_that_make_no_series(
    chosen: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _run("scaling", *chosen)
    assert message in capsys.readouterr().err


def test_a_store_that_reads_back_something_else_is_found() -> None:
    check_read = importlib.import_module("benchmarks.store").check_read
    plain = np.random.default_rng(0).standard_normal((40, 2, 3), dtype=np.float32)
    orders = {"in order": np.arange(40), "shuffled": np.random.default_rng(1).permutation(40)}
    stored = torch.from_numpy(plain.copy())
    check_read("disk", stored, plain, orders, torch.float32)
    stored[39, 1, 2] = torch.nextafter(stored[39, 1, 2], torch.tensor(9.0))
    with pytest.raises(AssertionError, match=r"disk, in order: examples 32 to 39 read back otherwise"):
        check_read("disk", stored, plain, orders, torch.float32)


def test_memory_of_several_processes_is_one_row() -> None:
    gathered = importlib.import_module("benchmarks.store_memory").gathered
    parts = [
        Part([Row("held", Spread.of([x]), peak_bytes=int(10 * x))], ["budget 10"]) for x in (1.0, 3.0, 1.5)
    ]
    (row,), notes = gathered(parts)
    assert (row.value.median, row.value.n, row.peak_bytes, notes) == (1.5, 3, 30, ["budget 10"])


def test_units_are_measured_around_every_repeat() -> None:
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timed = interleaved(ways, lambda: calls.append("unit"), 2, torch.device("cpu"), units_around=1)
    first, second = ["unit", "a", "unit", "unit", "b", "unit"], ["unit", "b", "unit", "unit", "a", "unit"]
    assert calls == ["unit", *first, *second]
    assert len(timed["a"].units) == 2


def test_spread() -> None:
    spread = Spread.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (spread.median, spread.q1, spread.q3, spread.n) == (3.0, 2.0, 4.0, 5)
    assert 1 <= spread.low <= 3 <= spread.high <= 100


def test_targets() -> None:
    timed = Timed(seconds=[2.2, 2.0, 2.1], unit_seconds=[1.0, 1.0, 1.0])
    assert Row.timed("x", timed, target=2.1).met
    assert not Row.timed("x", timed, target=2.0).met
    assert Row.timed("x", timed, target=1.9, or_contains=2.05).met
    assert Row.timed("x", timed, target=2.0, at_least=True).met
    row = Row.timed("x", timed, rows=21, unit_images=7)
    assert row.interventions == pytest.approx(10)
    assert row.of_plain == pytest.approx(21 / (2.1 * 7))


def test_a_gpu_gets_more_images() -> None:
    presets = {"full": {"examples": 8, "repeats": 3}, "cuda": {"examples": 64}, "small": {"examples": 1}}
    parser = options.add("")
    assert options.parse(parser, presets, ["--device", "cuda"]).examples == 64
    assert options.parse(parser, presets, ["--device", "cuda", "--small"]).examples == 1
    assert options.parse(parser, presets, ["--examples", "5"]).examples == 5
