"""How an experiment is cut: under a budget, by measured throughput, and in time that does not count."""

from __future__ import annotations

import gc
import json
import math
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vit_mechinterp as vmi
from tests.engine.experiments import cut_small
from tests.engine.world import World, world_of
from tests.tiny_models import HF_DINOV2, TIMM_PLAIN, Tiny
from vit_mechinterp import Run
from vit_mechinterp.engine import prepare
from vit_mechinterp.engine.scheduling import throughput
from vit_mechinterp.engine.scheduling.sizes import in_words, parse_bytes
from vit_mechinterp.errors import SpecError

Document = dict[str, Any]


class Held(TorchDispatchMode):
    """Bytes of all tensors that are alive and were made inside, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | given:  # a view of a weight is not new
                    self._add(storage._cdata, storage.nbytes(), storage)
        return output

    def _add(self, key: int, nbytes: int, storage: torch.UntypedStorage) -> None:
        self.known.add(key)
        self.bytes += nbytes
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.bytes -= nbytes


def swap(site: str, **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": "source", "tokens": ["cls", 2], **fields}


def run(name: str, *edits: Document, **fields: Any) -> Document:
    return {"name": name, "interventions": list(edits), **fields}


EXPERIMENTS = {
    "sweep": [run(f"{n}", swap(f"blocks.{n}.resid_post")) for n in range(3)],
    "heads": [run(f"{n}", swap("blocks.1.attn.z", heads=[n % 2]), capture=["blocks.2.resid_mid"]) for n in range(6)],
    "patterns": [run(f"{n}", swap(f"blocks.{n}.attn.pattern"), capture=["blocks.2.attn.scores"]) for n in range(3)],
    "results": [run("r", swap("blocks.1.attn.result")), run("clean", capture=["blocks.*.mlp.post"])],
    "graph": [
        run("sender", swap("blocks.0.mlp.post")),
        run("receiver", swap("blocks.1.resid_post", source={"run": "sender"})),
        run("mean", {"op": "ablate", "site": "blocks.0.attn.z", "method": "mean"}),
    ],
}


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_DINOV2], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_peak_that_a_plan_states_is_a_bound(tiny: Tiny, name: str) -> None:
    world = world_of(tiny, 6)
    world.vit.sites()
    documents = EXPERIMENTS[name]
    runs = list(map(Run.model_validate, documents))
    for batch_size, chunk in ((36, None), (4, None), (4, 2)):
        options: dict[str, Any] = {"batch_size": batch_size}
        if chunk is not None:
            options["memory"] = world.memory(documents, chunk, batch_size)
        plan = vmi.plan(world.vit, runs, world.columns, **options)
        with Held() as held:
            results = world.execute(documents, **options)
        del results
        bound = plan.peak_bytes + 2 * plan.result_bytes
        assert held.most <= bound, f"{held.most / bound:.2f} of the bound"
        assert held.most >= bound / 8, f"{held.most / bound:.2f} of the bound, which says nothing"
        if chunk is not None:
            assert plan.peak_bytes <= options["memory"]


def test_a_budget_that_holds_no_row_is_refused() -> None:
    world = world_of(TIMM_PLAIN, 4)
    runs = [Run.model_validate(run("a", swap("blocks.0.resid_post")))]
    with pytest.raises(SpecError, match=r"memory='10KiB' is too little: one example and one row take \d"):
        vmi.execute(world.vit, runs, world.columns, memory="10KiB", progress=False)
    with pytest.raises(SpecError, match="memory='much' is no amount"):
        vmi.plan(world.vit, runs, world.columns, memory="much")
    narrow = vmi.plan(world.vit, runs, world.columns, memory="200KiB")
    assert narrow.width < vmi.plan(world.vit, runs, world.columns).width
    assert narrow.peak_bytes <= 200 * 1024
    assert f"at most {narrow.peak_bytes / 1024:.3g} KiB beside the model" in str(narrow)
    asked = vmi.plan(world.vit, runs, world.columns, memory="200KiB", batch_size=4)
    assert asked.width < 4
    assert asked.peak_bytes <= 200 * 1024


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_the_budget_that_a_refusal_names_is_enough(tiny: Tiny, name: str) -> None:
    world = world_of(tiny, 6)
    runs = list(map(Run.model_validate, EXPERIMENTS[name]))
    with pytest.raises(SpecError, match="is too little") as refused:
        vmi.plan(world.vit, runs, world.columns, memory=1)
    named = str(refused.value).split(" take ")[1].rstrip(".")
    assert vmi.plan(world.vit, runs, world.columns, memory=named).peak_bytes <= parse_bytes(named)
    with pytest.raises(SpecError, match=f"one row take {named}"):  # and there is no lower one
        vmi.plan(world.vit, runs, world.columns, memory=int(0.98 * parse_bytes(named)))


@pytest.mark.parametrize("unit", [1, 1024, 1024**2, 1024**3])
def test_amounts_that_are_rounded_up_are_enough(unit: int) -> None:
    for n in (1, 7, 96.84, 104.5, 998.1, 999.4, 999.9, 1010.2, 1023.999):
        nbytes = math.ceil(n * unit)
        assert nbytes <= parse_bytes(in_words(nbytes, up=True)) <= 1.01 * nbytes + 1
    assert [in_words(nbytes) for nbytes in (0, 999, 1010 * 1024, 1.5 * 1024**4)] == ["0 B", "999 B", "1010 KiB", "1.5 TiB"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vit_mechinterp" / "throughput.json"


def many(n: int) -> list[Run]:
    return [Run.model_validate(run(f"{i}", swap("blocks.0.resid_pre", tokens=[i % 16, 3 if i % 16 != 3 else 4]),
            {"op": "add_direction", "site": "blocks.1.ln1", "vector": "v", "alpha": 1.0 + i})) for i in range(n)]  # fmt: skip


def test_the_width_of_much_work_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(TIMM_PLAIN, 6)
    world.vit.sites()
    monkeypatch.setattr(throughput, "likely_width", lambda vit: 8)
    monkeypatch.setattr(throughput, "WORTHWHILE", 1)
    asked: list[int] = []

    def seconds(vit: Any, width: int) -> float:
        asked.append(width)
        return native(vit, width) * 0 + abs(width - 4) + 1.0

    native = throughput._seconds_per_row
    monkeypatch.setattr(throughput, "_seconds_per_row", seconds)
    tensors = {"v": torch.ones(24)}
    results = vmi.execute(world.vit, many(60), world.columns, tensors, progress=False)
    assert asked == [2, 4, 8, 16, 32]
    assert results.provenance["rows_per_forward"] == 4
    assert list(json.loads(cache.read_text()).values()) == [4]
    monkeypatch.setattr("vit_mechinterp.engine.scheduling.cutting.MUCH", 0)
    assert vmi.plan(world.vit, many(60), world.columns).width == 4
    again = vmi.execute(world.vit, many(60), world.columns, tensors, progress=False)
    assert len(asked) == 5
    assert torch.equal(again.logits, results.logits)
    given = vmi.execute(world.vit, many(3), world.columns, tensors, batch_size=7, progress=False)
    assert given.provenance["rows_per_forward"] == 7


def test_a_width_that_little_memory_allows_is_remembered_for_so_little_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = world_of(TIMM_PLAIN, 6).vit
    monkeypatch.setattr(throughput, "likely_width", lambda vit: 8)
    monkeypatch.setattr(throughput, "_seconds_per_row", lambda vit, width: 1.0 + abs(width - 16))
    assert throughput.measured_width(vit, 3, 10**6) == 3
    assert throughput.remembered_width(vit, 3) == 3
    assert throughput.remembered_width(vit, 1000) is None
    assert throughput.measured_width(vit, 1000, 10**6) == 16
    assert [throughput.remembered_width(vit, most) for most in (3, 4, 32, 1000)] == [3, 16, 16, 16]


def test_little_work_is_not_measured_for(cache: Path) -> None:
    world = world_of(TIMM_PLAIN, 6)
    vmi.execute(world.vit, many(3), world.columns, {"v": torch.ones(24)}, progress=False)
    assert not cache.exists()


def test_a_cache_that_cannot_be_read_or_written_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = world_of(TIMM_PLAIN, 6).vit
    cache.parent.mkdir()
    for text in ("{", "[1]", '{"a": 3}'):
        cache.write_text(text)
        assert throughput.remembered_width(vit, 1000) is None
    throughput._remember(throughput._key(vit), 5)
    assert throughput.remembered_width(vit, 1000) == 5
    (cache.parent.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent / "file"))
    throughput._remember("key", 5)
    assert throughput.remembered_width(vit, 1000) is None


def test_planning_takes_time_in_proportion_to_the_rows() -> None:
    world = World(TIMM_PLAIN, 400)
    world.vit.sites()
    times = []
    for n in (25, 100):
        runs = [
            Run.model_validate(run(f"{i}", swap(f"blocks.{i % 3}.attn.z", tokens={"column": "here"}, heads=[i % 3]),
                {"op": "ablate", "site": "blocks.2.mlp_out", "method": "resample", "seed": i % 4})) for i in range(n)
        ]  # fmt: skip
        begin = time.process_time()
        vmi.plan(world.vit, runs, world.columns)
        times.append((time.process_time() - begin) / (n * 400))
    assert times[1] < 2 * times[0]
    assert times[1] < 50e-6, "seconds of planning per row"


def test_chunks_hold_more_rows_of_a_model_whose_rows_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_mechinterp.engine.scheduling import cutting

    world = world_of(HF_DINOV2, 40)
    runs = [Run.model_validate(run(f"run {n}", swap("blocks.0.resid_post", tokens=[n]))) for n in range(4)]

    def chunk() -> int:
        return vmi.plan(world.vit, runs, world.columns, batch_size=2).chunk

    tokens, d, layers = world.vit.layout.tokens.n_tokens, world.module_width, world.vit.layout.n_layers
    row = layers * tokens * (12 * d * d + 2 * tokens * d)  # weights, then scores and their sums
    monkeypatch.setattr(cutting, "FEWEST_ROWS", 8)
    monkeypatch.setattr(cutting, "MOST_ROWS", 120)
    chunks = []
    for rows in (1, 20, 64, 1000):
        monkeypatch.setattr(cutting, "CHUNK_WORK", {"cpu": rows * row, "cuda": 1})
        chunks.append(chunk())
    assert chunks == [2, 5, 16, 30]  # 4 rows an example, between 8 and 120 of them


@pytest.mark.parametrize("what", ["execute", "train"])
def test_no_tensor_waits_for_python_to_look_for_circles(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a chunk's values would be there beside those of the next."""
    world = World(TIMM_PLAIN, 12)
    cut_small(monkeypatch)
    edits = [swap("blocks.0.resid_post"), swap("blocks.1.attn.z", heads=[1]), swap("blocks.2.mlp.post")]
    documents = [run(f"{n}", *edits[: n + 1]) for n in range(3)]
    if what == "execute":
        documents += [run("z", swap("blocks.1.attn.z")), run("m", {"op": "ablate", "site": "blocks.1.ln2", "method": "mean"})]
    runs = list(map(Run.model_validate, documents))

    def work() -> None:
        if what == "execute":
            world.execute(documents, batch_size=5)
            return
        with prepare(world.vit, runs, world.columns, {}, progress=False) as prepared, torch.enable_grad():
            prepared([0, 1, 2], {}).sum()

    work()  # what is remembered of the model is kept
    gc.collect()
    before = gc.get_debug()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        work()
        gc.collect()
        waiting = [tuple(found.shape) for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(before)
        gc.garbage.clear()
        gc.enable()
    assert not waiting
