"""Runs whose output nobody wants: they give the same captures, and go no further than these."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.experiments import assert_same_bits
from tests.engine.test_floor import SITES, TOKENS, needed
from tests.engine.test_sharing import repeating
from tests.engine.world import Counted, World, world_of
from tests.tiny_models import HF_VIT, MAIN, N_LAYERS, TIMM_PLAIN, TIMM_POOLED, Tiny
from vit_mechinterp import Experiment, Results, Run, Sweep
from vit_mechinterp.engine import prepare
from vit_mechinterp.engine.results.resume import FinishedChunks
from vit_mechinterp.errors import SpecError

Document = dict[str, Any]
N = 5
BEHIND_CALL = ("attn.z", "attn_out", "resid_mid", "mlp.post", "mlp_out")
"""Sites at which every token is made of all that entered the block."""


def swap(site: str, **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": "source", "tokens": ["cls", 3], **fields}


def run(name: str, *edits: Document, **fields: Any) -> Document:
    return {"name": name, "interventions": list(edits), **fields}


def zero(site: str, tokens: list[int]) -> Document:
    return {"op": "ablate", "site": site, "tokens": tokens}


def unwanted(name: str, *edits: Document, **fields: Any) -> Document:
    return run(name, *edits, output=False, **fields)


def counted(world: World, documents: list[Document], **options: Any) -> tuple[list[int], Results]:
    """Rows that pass each block, as planned, and results that the oracle agrees with."""
    runs = [Run.model_validate(document) for document in documents]
    plan = vmi.plan(world.vit, runs, world.columns, **options)
    with Counted(world.module) as count:
        results = world.execute(documents, **options)
    assert (count.total, count.launches) == (plan.block_evaluations, plan.launches)
    world.check(documents, results, effect=None)
    return count.rows, results


def test_rows_end_where_they_are_read() -> None:
    world = world_of(TIMM_PLAIN, N)
    edit = swap("blocks.0.resid_post")
    ways = {
        "blocks.0.resid_post": [2 * N, 0, 0],  # base and source
        "blocks.1.resid_pre": [2 * N, 0, 0],
        "blocks.1.attn.pattern": [2 * N, N, 0],
        "blocks.2.resid_pre": [2 * N, N, 0],
        "blocks.2.ln1": [2 * N, N, N],
        "ln_final": [2 * N, N, N],
    }
    for site, expected in ways.items():
        rows, results = counted(world, [unwanted("seen", edit, capture=[site])])
        assert rows == expected, site
        assert results.logits.shape == (0, N, 5)
        assert results.run_names == ()
        clean = world.oracle.clean("base")[1][site]
        assert float((results.captures["seen"][site] - clean).abs().max()) > 1e-3


@pytest.mark.parametrize("tiny", MAIN, ids=lambda tiny: tiny.name)
def test_every_site_of_a_run_that_ends_there(tiny: Tiny) -> None:
    world = world_of(tiny)
    pairs = list(combinations(range(12), 2))  # runs that are equal would be one
    documents = [
        unwanted(f"{n} {site}", swap(edited, tokens=["cls", *pairs[k]]), capture=[site])
        for n, edited in enumerate(("embed", "blocks.0.resid_post", "blocks.1.attn.z", "blocks.1.mlp_out"))
        for k, site in enumerate(world.sites)
    ]
    world.check(documents, world.execute(documents, batch_size=7))
    with_outputs = [{**document, "output": True} for document in documents]
    more, less = ([Run.model_validate(own) for own in every] for every in (with_outputs, documents))
    assert vmi.plan(world.vit, less).block_evaluations < vmi.plan(world.vit, more).block_evaluations


@pytest.mark.parametrize("more", [[], [run("c", zero("blocks.2.resid_post", [2, 3]), capture=["blocks.2.resid_post"])]])
@pytest.mark.parametrize("edits", [["blocks.0.resid_post", "blocks.2.resid_pre"], ["blocks.2.resid_pre"]])
def test_runs_that_are_declared_alike_stay_equal_whatever_is_read_of_them(edits: list[str], more: list[Document]) -> None:
    """One of them reads the input of a block, which for the other goes by the name of the output before it."""
    world = world_of(TIMM_PLAIN, N)
    same = [zero(site, [3]) for site in edits]
    documents = [run("a", *same, capture=["blocks.2.resid_pre"]), unwanted("b", *same, capture=["blocks.1.ln1"]), *more]
    both, results = counted(world, documents)
    world.check(documents, results, effect=None)
    alone, _ = counted(world, [documents[0], *more])
    assert both == alone


def test_a_run_that_is_read_ends_where_it_is_read() -> None:
    world = world_of(TIMM_PLAIN, N)
    start = unwanted("start", swap("blocks.0.resid_post"))
    reader = run("reader", {**swap("blocks.1.resid_post"), "source": {"run": "start"}, "tokens": [3, 4]})
    rows, results = counted(world, [start, reader])
    assert rows == [2 * N, 2 * N, N]  # the base goes to block 1, the source to block 0, the reader through block 2
    assert results.run_names == ("reader",)
    clean = world.oracle.clean("base")[0]
    assert float((results["reader"] - clean).abs().max()) > 1e-3
    rows, _ = counted(world, [{**start, "output": True}, reader])
    assert rows == [2 * N, 2 * N, 2 * N]


def test_rows_that_begin_alike_hand_on_what_one_of_them_shows() -> None:
    world = world_of(TIMM_PLAIN, N)
    first = swap("blocks.0.resid_post")
    long = run("long", first, swap("blocks.2.attn_out", source="base", tokens="cls"))
    short = unwanted("short", first, capture=["blocks.1.attn.z"])
    alone, _ = counted(world, [long])
    for documents in ([long, short], [short, long]):
        rows, results = counted(world, documents)
        assert rows == alone
        assert float(results.captures["short"]["blocks.1.attn.z"].abs().max()) > 0.01
    # One of them goes further than the other had gone with it.
    fork = unwanted("fork", first, swap("blocks.1.resid_post", tokens=[5]), capture=["blocks.2.resid_post"])
    rows, _ = counted(world, [short, fork])
    assert rows == [2 * N, 2 * N, N]
    rows, _ = counted(world, [fork, short, long])
    assert rows == [2 * N, 3 * N, 3 * N]


def test_equal_rows_are_one_that_goes_as_far_as_any_of_them() -> None:
    world = world_of(TIMM_PLAIN, N)
    edit = swap("blocks.0.resid_post")
    early, late = unwanted("early", edit, capture=["blocks.1.ln1"]), unwanted("late", edit, capture=["blocks.2.ln1"])
    for documents in ([early, late], [late, early]):
        assert counted(world, documents)[0] == [2 * N, N, N]
    whole = run("whole", edit)
    rows, results = counted(world, [early, whole, late])
    assert rows == [2 * N, N, N]
    assert torch.equal(results["whole"], counted(world, [whole])[1]["whole"])


@pytest.mark.parametrize("readout", [None, vmi.CrossEntropy(answer="label")])
@pytest.mark.parametrize("first_wanted", [True, False])
def test_equal_rows_of_other_chunks(readout: Any, first_wanted: bool) -> None:
    world = repeating(TIMM_PLAIN)
    edit = swap("blocks.0.resid_post", tokens=[2])
    documents = [run("whole", edit), unwanted("seen", edit, capture=["blocks.1.ln1"])]
    documents = documents if first_wanted else documents[::-1]
    memory = world.memory(documents, 1, 2)
    _, results = counted(world, documents, memory=memory, batch_size=2) if readout is None else (None, None)
    cut = world.execute(documents, memory=memory, batch_size=2, readout=readout)
    whole = world.execute(documents, readout=readout)
    assert cut.provenance["chunk"] == 1
    assert torch.allclose(cut.logits, whole.logits, atol=1e-6)
    assert results is None or torch.allclose(results.logits, cut.logits, atol=1e-6)


@pytest.mark.parametrize("tiny", [HF_VIT, TIMM_POOLED], ids=lambda tiny: tiny.name)
def test_what_is_shown_before_a_base_is_replaced_is_the_bases(tiny: Tiny) -> None:
    world = world_of(tiny)
    early, late = "blocks.0.resid_post", "blocks.2.attn_out"
    start = run("start", swap("blocks.0.attn.z", tokens="all"))
    for source in ("source", {"run": "start"}):
        for site in ("blocks.1.resid_post", "blocks.1.resid_mid"):
            seen = unwanted("seen", swap(site, tokens="all") | {"source": source}, capture=[early, late])
            more = unwanted("more", *seen["interventions"], swap("blocks.2.attn.q", tokens=[2]), capture=[early, late])
            for documents in ([start, seen], [start, more], [start, seen, more]):
                _, results = counted(world, documents)
                for own in documents[1:]:
                    captured, clean = results.captures[own["name"]], world.oracle.clean("base")[1]
                    assert torch.allclose(captured[early], clean[early], atol=1e-4)
                    assert not torch.allclose(captured[late], clean[late], atol=1e-2)


def test_runs_whose_readers_read_nothing_of_theirs_are_left_out() -> None:
    world = world_of(TIMM_PLAIN, N)
    start = unwanted("start", swap("blocks.0.resid_post", tokens=[3, 4]))
    for site, expected in (("attn.q", [N, N, N]), ("resid_pre", [N, N, N])):
        reader = run("reader", swap(f"blocks.1.{site}", tokens=[7]) | {"source": {"run": "start"}})
        rows, _ = counted(world, [start, reader])
        assert rows == expected, site  # token 7 is the base's own
    reader = run("reader", swap("blocks.1.ln1", tokens=[3]) | {"source": {"run": "start"}})
    rows, results = counted(world, [start, reader])
    assert rows == [2 * N, 2 * N, N]  # token 3 is the source's
    assert float((results["reader"] - world.oracle.clean("base")[0]).abs().max()) > 1e-3
    plan = vmi.plan(world.vit, [Run.model_validate(own) for own in (start, reader)], world.columns)
    assert [(rows.run, rows.blocks) for rows in plan.rows] == [("reader", 2)]


@pytest.mark.parametrize("seen", ["blocks.1.attn.k", "blocks.1.attn.v", "blocks.1.attn.q", "blocks.0.mlp_out", "blocks.2.attn.z"])
def test_a_run_is_read_off_the_rows_of_an_equal_one_that_goes_on(seen: str) -> None:
    world = world_of(HF_VIT, N)
    edits = [swap("blocks.1.attn.q", tokens=[3]), swap("blocks.2.ln2", tokens=["cls"])]
    whole = run("whole", *edits)
    with_output, _ = counted(world, [run("seen", *edits, capture=[seen]), whole])
    without, _ = counted(world, [unwanted("seen", *edits, capture=[seen]), whole])
    assert sum(without) <= sum(with_output)


def test_a_run_that_goes_on_from_another_ones_stream_shares_its_beginning() -> None:
    world = world_of(TIMM_PLAIN, N)
    start = run("start", swap("blocks.0.resid_post"))
    over = swap("blocks.1.resid_post", tokens="all") | {"source": {"run": "start"}}
    rows, _ = counted(world, [start, run("reader", over, swap("blocks.2.attn_out", tokens="cls"))])
    assert rows == [2 * N, 2 * N, 3 * N]  # base and source in block 0; start, and the source's own attention; both runs


def test_clean_runs_without_output_go_as_far_as_their_captures() -> None:
    world = world_of(HF_VIT, N)
    rows, results = counted(world, [{"name": "clean", "capture": ["blocks.0.mlp.post"], "output": False}])
    assert rows == [N, 0, 0]
    assert results.logits.shape[:2] == (0, N)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_with_a_store_folders_and_backends(batch_size: int, tmp_path: Path) -> None:
    world = world_of(TIMM_PLAIN, N)
    documents = [
        unwanted("seen", swap("blocks.0.attn.z", tokens={"column": "here"}), capture=["blocks.1.resid_mid"]),
        run("kept", swap("blocks.1.mlp.post"), capture=["blocks.1.mlp_out"]),
        {"name": "clean", "capture": ["embed"], "output": False},
    ]
    expected = world.execute(documents)
    world.check(documents, expected, effect=None)
    memory = world.memory(documents, 2, batch_size) if batch_size == 2 else None
    with vmi.ActivationStore() as store:
        ways = {
            "store": world.execute(documents, batch_size=batch_size, store=store, memory=memory),
            "folder": world.execute(documents, batch_size=batch_size, out=tmp_path / "out", memory=memory),
            "hooks": world.execute(documents, batch_size=batch_size, backend="hooks"),
        }
    for way, results in ways.items():
        assert results.run_names == ("kept",), way
        assert torch.allclose(results.logits, expected.logits, atol=1e-5), way
        world.check(documents, results, effect=None)
        loaded = Results.load(results.save(tmp_path / way))
        assert list(loaded.captures) == list(results.captures) == ["seen", "kept", "clean"]
        assert loaded.run_names == ("kept",)
        assert torch.equal(loaded.captures["seen"]["blocks.1.resid_mid"], results.captures["seen"]["blocks.1.resid_mid"])
        assert set(results.to_pandas().run) == {"kept"}


def test_a_stopped_experiment_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = repeating(TIMM_PLAIN)
    edit = swap("blocks.0.resid_post", tokens=[2])
    documents = [unwanted("seen", edit, capture=["blocks.1.ln1"]), run("whole", edit), run("other", swap("blocks.1.attn.q"))]
    options: dict[str, Any] = {"memory": world.memory(documents, 1, 2), "batch_size": 2}
    add, finished = FinishedChunks.add, []

    def stopping(self: Any, chunk: range, *args: Any) -> None:
        add(self, chunk, *args)
        finished.append(chunk)
        if len(finished) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FinishedChunks, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            world.execute(documents, out=tmp_path, **options)
        results = world.execute(documents, out=tmp_path, **options)
    assert sorted(chunk.start for chunk in finished) == list(range(len(finished)))
    assert_same_bits(results, world.execute(documents, **options))


@pytest.mark.parametrize("out", [False, True])
def test_an_experiment_without_any_output(out: bool, tmp_path: Path) -> None:
    world = world_of(TIMM_PLAIN, N)
    documents = [unwanted("seen", swap("blocks.0.attn.z"), capture=["blocks.1.resid_mid"])]
    options: dict[str, Any] = {"out": tmp_path / "out"} if out else {}
    for readout, shape in ((None, (0, N, 5)), (vmi.CrossEntropy(answer="label"), (0, N)),
                           (vmi.SelectedLogits(classes=[1, 2]), (0, N, 2))):  # fmt: skip
        results = world.execute(documents, readout=readout, **{k: v / str(len(shape) + shape[-1]) for k, v in options.items()})
        assert results.logits.shape == shape
        world.check(documents, results, effect=None)
        assert len(results.to_pandas()) == 0
        assert Results.load(results.save(tmp_path / "saved")).logits.shape == shape
    assert world.execute(documents, backend="hooks").logits.shape == (0, N, 5)


def test_what_is_wrong_is_said() -> None:
    world = world_of(TIMM_PLAIN, N)
    nothing = Run.model_validate(unwanted("nothing", swap("blocks.0.attn.z")))
    with pytest.raises(SpecError, match="Nobody wants anything of run 'nothing': it has output=False, no capture, and no"):
        vmi.plan(world.vit, [nothing])
    seen = Run.model_validate(unwanted("seen", swap("blocks.0.attn.z"), capture=["embed"]))
    with pytest.raises(SpecError, match=r"Runs without output .* cannot be prepared, which is for their outputs: seen"):
        prepare(world.vit, [seen], world.columns, {}).__enter__()
    results = vmi.execute(world.vit, [seen], world.columns, progress=False)
    with pytest.raises(KeyError, match=r"Run 'seen' has no output .* What it captured is captures\['seen'\]"):
        results["seen"]
    with pytest.raises(KeyError, match=r"There is no run 'see'\. Close matches: seen\. Runs: seen\."):
        results["see"]
    assert repr(results) == "Results(0 runs x 5 examples, 1 runs without output, 1 captures)"
    start, reader = unwanted("start", swap("blocks.0.attn.z")), run("reader", swap("blocks.1.attn.z"))
    reader["interventions"][0]["source"] = {"run": "start"}
    results = world.execute([start, reader])
    with pytest.raises(KeyError, match=r"Run 'start' has no output \(output=False\)\.\"$"):
        results["start"]
    with pytest.raises(SpecError, match="output"):
        Run.model_validate(run("seen", output="no"))


def test_documents_and_sweeps_say_it(tmp_path: Path) -> None:
    sweep = Sweep.model_validate(
        {"interventions": [swap("blocks.0.resid_post")], "over": {"layer": "all"}, "capture": ["blocks.2.ln1"], "output": False}
    )
    assert [own.output for own in sweep.runs(3)] == [False] * 3
    experiment = Experiment.model_validate({"runs": [sweep.model_dump(mode="json")]})
    experiment.to_yaml(tmp_path / "experiment.yaml")
    assert Experiment.from_yaml(tmp_path / "experiment.yaml") == experiment
    assert "output: false" in experiment.to_yaml()
    world = world_of(TIMM_PLAIN, N)
    plan = vmi.plan(world.vit, experiment, world.columns)
    assert "no output is wanted of layer0, layer1, layer2: rows end at the last place where they are read" in str(plan)


@pytest.mark.parametrize("seed", range(5, 16))
def test_no_pair_is_computed_that_need_not_be(seed: int) -> None:
    world = repeating(TIMM_PLAIN)
    documents = drawn(random.Random(seed))
    rows, _ = counted(world, documents)
    assert sum(rows) == needed(world, documents, N_LAYERS)


def drawn(draw: random.Random) -> list[Document]:
    """Runs, some behind the interventions of another one, with outputs or with captures in blocks behind their own."""
    documents: list[Document] = []
    for n in range(draw.randint(2, 6)):
        begun = draw.choice([[], [], *(document["interventions"] for document in documents)])
        edits, deepest = [*begun[:2]], max((int(edit["site"].split(".")[1]) for edit in begun[:2]), default=0)
        wanted = deepest == N_LAYERS - 1 or draw.random() < 0.4
        for _ in range(draw.randint(1, 2)):
            layer = draw.randrange(N_LAYERS if wanted else N_LAYERS - 1)
            site, source = f"blocks.{layer}.{draw.choice(SITES)}", draw.choice(["source", "source", "base"])
            edits.append(swap(site, tokens=draw.choice(TOKENS), source=source))
            deepest = max(layer, deepest)
        seen = f"blocks.{draw.randint(deepest + 1, N_LAYERS - 1)}.{draw.choice(BEHIND_CALL)}" if not wanted else ""
        documents.append(run(f"r{n}", *edits, **({} if wanted else {"output": False, "capture": [seen]})))
    return documents


@pytest.mark.parametrize("site", ["blocks.0.resid_post", "blocks.1.resid_pre"])
@pytest.mark.parametrize("last", ["blocks.2.resid_post", "blocks.2.mlp_out"])
def test_one_that_ends_among_the_interventions_of_its_equal(site: str, last: str) -> None:
    """What it captures lies between two that are written at one place of the stream for the other."""
    world = world_of(TIMM_PLAIN, N)
    places = ("blocks.0.resid_post", "blocks.1.resid_pre", last)
    edits = [{"op": "add_direction", "site": place, "vector": "direction.24"} for place in places]
    counted(world, [unwanted("seen", *edits, capture=[site]), run("out", *edits)])
