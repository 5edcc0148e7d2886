"""Losses and selected logits in place of whole outputs: the oracle's numbers, and nothing else that is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vit_mechinterp as vmi
from tests.engine.experiments import DOCUMENTS, assert_same_bits, cut_small
from tests.engine.test_cutting import Held
from tests.engine.world import TOLERANCE, Counted, World, world_of
from tests.tiny_models import HF_CLIP, HF_VIT, N_LAYERS, TIMM_PLAIN, Tiny, stirred
from vit_mechinterp import CrossEntropy, Results, Run, SelectedLogits
from vit_mechinterp.engine.binding.readout import bind_readout
from vit_mechinterp.engine.forwards.chunk import Collected
from vit_mechinterp.engine.results import resume
from vit_mechinterp.engine.results.collect import Gathering
from vit_mechinterp.errors import DataError, ExecutionError, SpecError

IMAGES = [0, 0, 1, 2, 0, 1, 1, 3]
"""Example by example, which image it has: equal ones in one chunk of two examples, and in several."""
LABELS = [0, 1, 2, 3, 4, 0, 3, 1]
SAME: dict[str, Any] = {
    "name": "same",
    "interventions": [{"op": "interchange", "site": "blocks.0.resid_post", "source": "source", "tokens": ["cls", 2]}],
}
RUNS = [*DOCUMENTS, SAME]
READOUTS = [
    CrossEntropy(answer="label"),
    CrossEntropy(answer=3),
    SelectedLogits(classes=[4, "label"]),
    SelectedLogits(classes=1),
]


@pytest.fixture(scope="module")
def world() -> World:
    return repeating()


def repeating(tiny: Tiny = TIMM_PLAIN) -> World:
    """Few images under many labels; the last example's source is its base, so that exchanging them does nothing."""
    world = World(tiny, len(IMAGES))
    world.columns |= {name: column[IMAGES] for name, column in world.columns.items()}
    world.columns["source"][-1] = world.columns["base"][-1]
    world.columns["label"] = torch.tensor(LABELS)
    world.vit.sites()
    return world


def wanted(world: World, readout: Any, documents: list[dict[str, Any]] = RUNS) -> Tensor:
    """What the oracle keeps of its outputs, ``[run, example, *readout]``."""
    world.oracle.documents = {document["name"]: document for document in documents}
    logits = torch.stack([world.oracle.run(document)[0] for document in documents]).double()
    read = [getattr(entry, "column", entry) for entry in readout.read]
    classes = [torch.full((world.n,), c) if isinstance(c, int) else world.columns[c] for c in read]
    chosen = torch.stack([logits[:, torch.arange(world.n), own] for own in classes], dim=-1)
    if isinstance(readout, SelectedLogits):
        return chosen
    return logits.exp().sum(-1).log() - chosen[..., 0]


def check(world: World, results: Results, readout: Any, documents: list[dict[str, Any]] = RUNS) -> None:
    """The oracle's numbers, which every run changes, and which differ between examples of one image."""
    expected = wanted(world, readout, documents)
    assert results.logits.dtype == torch.float32
    assert results.logits.shape == expected.shape
    assert float((results.logits - expected).abs().max()) <= 2 * TOLERANCE * world.scale
    clean = expected[results.run_names.index("clean")]
    for name, own in zip(results.run_names, expected, strict=True):
        assert name == "clean" or float((own - clean).abs().max()) > 1e-2, f"{name} changes nothing"
    if readout.columns:
        assert float((clean[0] - clean[1]).abs().max()) > 1e-2, "the same image, and the same number"
    assert results.readout == readout


@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: f"{readout.op} {readout.read[0]}")
@pytest.mark.parametrize("chunk", [2, len(IMAGES)])
def test_the_oracles_numbers(world: World, readout: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunk == 2:
        cut_small(monkeypatch)
    results = world.execute(RUNS, batch_size=3, readout=readout)
    assert results.provenance["chunk"] == chunk
    check(world, results, readout)
    whole = world.execute(RUNS, batch_size=64)
    for run in whole.run_names:  # captures stay what they are
        for site, value in whole.captures[run].items():
            for one, other in zip(value, results.captures[run][site], strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("readout", READOUTS[:3:2], ids=lambda readout: readout.op)
def test_on_another_model_and_in_bfloat16(readout: Any) -> None:
    check(world := repeating(HF_VIT), world.execute([DOCUMENTS[0], SAME], readout=readout), readout, [DOCUMENTS[0], SAME])
    low = World(TIMM_PLAIN, 4, torch.bfloat16)
    run = [Run.model_validate(document) for document in (DOCUMENTS[0], SAME)]
    whole = vmi.execute(low.vit, run, low.columns, progress=False, batch_size=4).logits
    kept = vmi.execute(low.vit, run, low.columns, progress=False, batch_size=4, readout=readout).logits
    assert kept.dtype == torch.float32
    rows = torch.arange(4)
    answers = whole[:, rows, low.columns["label"]]
    if isinstance(readout, CrossEntropy):
        assert torch.allclose(kept, whole.logsumexp(-1) - answers, atol=1e-5)
    else:
        assert torch.equal(kept, torch.stack([whole[..., 4], answers], dim=-1))
    assert float((kept[0] - kept[1]).abs().max()) > 1e-2


def test_rows_of_other_chunks_are_computed_again_and_the_plan_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    runs, readout = [Run.model_validate(document) for document in RUNS], CrossEntropy(answer="label")
    options: dict[str, Any] = {"batch_size": 3, "tensors": world.named(RUNS)}
    shared = vmi.plan(world.vit, runs, world.columns, **options)
    plan = vmi.plan(world.vit, runs, world.columns, readout=readout, **options)
    assert plan.clean_rows > 0
    assert 0 < plan.shared_rows < shared.shared_rows  # within a chunk, equal rows are still computed once
    assert plan.block_evaluations > shared.block_evaluations
    assert "rows are equal to rows of other chunks, and are computed again, because their outputs are not kept" in str(plan)
    assert "note: of every output this is kept: cross_entropy" in str(plan)
    assert "is kept:" not in str(shared)
    with Counted(world.module) as counted:
        results = world.execute(RUNS, batch_size=3, readout=readout)
    assert counted.total == plan.block_evaluations
    assert counted.launches == plan.launches
    numbers = sum(value.numel() if isinstance(value, Tensor) else 0 for c in results.captures.values() for value in c.values())
    assert plan.result_bytes >= 4 * (numbers + results.logits.numel())
    assert shared.result_bytes - plan.result_bytes == 4 * len(runs) * len(IMAGES) * (5 - 1)


def test_a_plan_needs_no_data_for_it(world: World) -> None:
    run = Run.model_validate(SAME)
    with Counted(world.module) as counted:
        plan = vmi.plan(world.vit, run, readout=SelectedLogits(classes=["label", 2]))
    assert counted.total == 0
    assert plan.result_bytes == 8
    assert "of every output this is kept: logit_label, logit_2" in str(plan)


def test_through_a_store(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)
    readout = CrossEntropy(answer="label")
    with vmi.ActivationStore() as store:
        first = world.execute(RUNS, batch_size=3, store=store, readout=readout)
        check(world, first, readout)
        assert_same_bits(world.execute(RUNS, batch_size=3, store=store, readout=readout), first)
        selected = SelectedLogits(classes=[4, "label"])  # of the same stored outputs
        check(world, world.execute(RUNS, batch_size=3, store=store, readout=selected), selected)


def interrupted(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Run until two chunks are finished."""
    original, finished = resume.FinishedChunks.add, 0

    def add(self: Any, *args: Any) -> None:
        nonlocal finished
        original(self, *args)
        finished += 1
        if finished == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume.FinishedChunks, "add", add)
        with pytest.raises(KeyboardInterrupt):
            world.execute(RUNS, batch_size=3, out=folder, **options)


@pytest.mark.parametrize("readout", READOUTS[:3:2], ids=lambda readout: readout.op)
def test_a_stopped_experiment_goes_on(
    world: World, readout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    with Counted(world.module) as everything:  # whose hooks see every token, so every token is computed
        whole = world.execute(RUNS, batch_size=3, readout=readout)
    with Counted(world.module):
        interrupted(world, tmp_path / "stopped", monkeypatch, readout=readout)
    parts = [load_file(path) for path in (tmp_path / "stopped" / "chunks").glob("*.safetensors")]
    kept = [part["outputs"] for part in parts if "outputs" in part]
    chunk = whole.provenance["chunk"]
    assert [tuple(own.shape) for own in kept] == 2 * [(len(RUNS), chunk, *whole.logits.shape[2:])]
    with Counted(world.module) as rest:
        results = world.execute(RUNS, batch_size=3, readout=readout, out=tmp_path / "stopped")
    assert_same_bits(results, whole)
    check(world, results, readout)
    assert 0 < rest.total < everything.total * (1 - chunk / len(IMAGES))
    with Counted(world.module) as nothing:
        again = world.execute(RUNS, batch_size=3, readout=readout, out=tmp_path / "stopped")
    assert nothing.total == 0
    assert_same_bits(again, whole)
    assert again.readout == readout


def test_a_folder_of_another_readout_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    readout = CrossEntropy(answer="label")
    interrupted(world, tmp_path / "read", monkeypatch, readout=readout)
    interrupted(world, tmp_path / "whole", monkeypatch)

    def refused(folder: str, text: str, **options: Any) -> None:
        with pytest.raises(ExecutionError, match=text):
            world.execute(RUNS, batch_size=3, out=tmp_path / folder, **options)

    refused("read", "holds another experiment: readout 'answer' differs", readout=CrossEntropy(answer=2))
    refused("read", "another experiment: the readout differs .* None here")
    refused("whole", "another experiment: the readout differs .None there", readout=readout)
    other = {**world.columns, "label": world.columns["label"].flip(0)}
    refused("read", "column 'label' differs", readout=readout, data=other)
    assert "readout" not in (tmp_path / "whole" / "chunks" / "experiment.json").read_text()


def test_whole_outputs_live_no_longer_than_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of many classes, whose outputs are most of what an experiment holds."""
    cut_small(monkeypatch)
    many, n = 4000, 24
    options: dict[str, Any] = {"embed_dim": 24, "depth": N_LAYERS, "num_heads": 3, "num_classes": many}
    vit = vmi.wrap(stirred(VisionTransformer(img_size=32, patch_size=8, **options)).eval())
    data = {"base": TIMM_PLAIN.images(n, 1), "source": TIMM_PLAIN.images(n, 2), "answer": list(range(n))}
    runs = [Run.model_validate(document) for document in ({"name": "clean"}, SAME)]
    vit.sites()

    def most(**how: Any) -> tuple[int, Results]:
        vmi.plan(vit, runs, data)  # what is found out about a model once
        with Held() as held:
            results = vmi.execute(vit, runs, data, batch_size=2, progress=False, **how)
        return held.most, results

    parts: list[tuple[int, ...]] = []
    original = Gathering.add

    def add(self: Gathering, chunk: range, part: Collected) -> None:
        parts.extend(tuple(rows.shape) for rows in part.outputs.values())
        original(self, chunk, part)

    outputs = 4 * many * n * len(runs)
    whole, results = most()
    first = vmi.plan(vit, runs, data, batch_size=2)
    assert outputs == first.result_bytes < whole <= first.peak_bytes + first.result_bytes
    monkeypatch.setattr(Gathering, "add", add)
    readout = CrossEntropy(answer="answer")
    held, losses = most(readout=readout)
    plan = vmi.plan(vit, runs, data, batch_size=2, readout=readout)
    assert held < outputs
    assert held <= plan.peak_bytes + plan.result_bytes
    assert plan.result_bytes == 4 * n * len(runs) == losses.logits.nbytes
    assert parts == [(plan.chunk,)] * (len(runs) * n // plan.chunk)
    assert n // plan.chunk >= 3
    expected = results.logits.double().logsumexp(-1) - results.logits[:, range(n), range(n)]
    assert torch.allclose(losses.logits, expected.float(), atol=1e-4)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-2


def test_a_loss_that_is_all_but_zero_is_not_rounded_to_zero(world: World) -> None:
    readout = bind_readout(world.vit, CrossEntropy(answer=0), None)
    assert readout is not None
    outputs = torch.tensor([[20.0, 0.0, -50.0, -50.0, -50.0]])
    assert float(readout(outputs, torch.zeros(1, dtype=torch.int64).numpy())) == pytest.approx(math.exp(-20), rel=1e-5, abs=0)
    assert float(torch.nn.functional.cross_entropy(outputs, torch.tensor([0]))) == 0


@pytest.mark.parametrize(
    ("readout", "data", "error", "text"),
    [
        (CrossEntropy(answer=5), {}, SpecError, "readout cross_entropy: class 5 is out of range; the model has classes 0 to 4"),
        (SelectedLogits(classes=[0, 7]), {}, SpecError, "readout selected_logits: class 7 is out of range"),
        (CrossEntropy(answer="labl"), {}, DataError, r"readout cross_entropy: the data has no column 'labl'\. Close matches: label\."),
        (CrossEntropy(answer="label"), {"label": [0, 1, 5, 0]}, DataError, "column 'label', example 2: class 5 is out of range; the model has classes 0 to 4. Give a column"),
        (CrossEntropy(answer="label"), {"label": [0, 1, 2, -100]}, DataError, "example 3: class -100 is out of range"),
        (CrossEntropy(answer="label"), {"label": [0, 1, 0.5, 0]}, DataError, "column 'label', example 2: 0.5 is not an integer"),
        (CrossEntropy(answer="here"), {}, DataError, r"column 'here', example 0: \[.*\] is not one integer per example"),
        (SelectedLogits(classes=[0, "box"]), {}, DataError, "readout selected_logits: column 'box', example 0"),
        ("cross_entropy", {}, SpecError, "readout is a CrossEntropy, a SelectedLogits or None, not 'cross_entropy'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_the_first_forward(
    readout: Any, data: dict[str, Any], error: type[Exception], text: str
) -> None:
    world = world_of(TIMM_PLAIN, 4)
    world.vit.sites()
    columns = {**world.columns, **data}
    with Counted(world.module) as counted:
        for compute in (vmi.execute, vmi.plan):
            with pytest.raises(error, match=text):
                compute(world.vit, Run(name="clean"), columns, readout=readout)
    assert counted.total == 0


def test_outputs_that_are_no_logits_are_refused() -> None:
    world = world_of(HF_CLIP, 3)
    text = r"reads one logit per class, and CLIPVisionModelWithProjection gives image_embeds of shape \(6,\) per example"
    with pytest.raises(SpecError, match=text):
        world.execute([DOCUMENTS[0]], readout=CrossEntropy(answer=1))
    import transformers

    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24, image_size=32, patch_size=8
    )
    headless = vmi.wrap(stirred(transformers.ViTModel(config, add_pooling_layer=False)).eval())
    with pytest.raises(SpecError, match=r"ViTModel gives last_hidden_state of shape \(17, 24\) per example\. Leave readout out"):
        vmi.execute(headless, Run(name="clean"), {"base": TIMM_PLAIN.images(2)}, readout=SelectedLogits(classes=1))


def test_tables_and_files_say_what_it_is(world: World, tmp_path: Path) -> None:
    loss = world.execute(RUNS, readout=CrossEntropy(answer="label"))
    table = loss.to_pandas()
    assert list(table.columns) == ["run", "example", "cross_entropy", "label"]
    row = table[(table["run"] == "push") & (table["example"] == 2)].iloc[0]
    assert row["cross_entropy"] == float(loss["push"][2])
    selected = world.execute(RUNS, readout=SelectedLogits(classes=[4, "label"]))
    assert list(selected.to_pandas().columns) == ["run", "example", "logit_4", "logit_label", "label"]
    assert selected.to_pandas()["logit_label"].tolist() == selected.logits[..., 1].flatten().tolist()
    again = Results.load(loss.save(tmp_path))
    assert_same_bits(again, loss)
    assert again.readout == loss.readout == CrossEntropy(answer="label")
    assert loss.provenance["readout"] == {"op": "cross_entropy", "answer": {"column": "label"}}
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "results.parquet"), table)
    whole = world.execute(RUNS)
    assert whole.readout is None
    assert "readout" not in whole.provenance


def test_the_column_counts_as_read(world: World) -> None:
    data = {**world.columns, "answer": world.columns["label"]}
    readout = CrossEntropy(answer="answer")
    one = world.execute([DOCUMENTS[0]], data=data, readout=readout)
    assert "answer" in one.provenance["columns"]
    other = world.execute([DOCUMENTS[0]], data={**data, "answer": data["answer"].flip(0)}, readout=readout)
    assert one.provenance["data"] != other.provenance["data"]
    assert float((one.logits - other.logits).abs().max()) > 1e-2
    assert "answer" not in world.execute([DOCUMENTS[0]], data=data).provenance["columns"]


def test_an_experiment_has_one_and_the_argument_wins(world: World) -> None:
    experiment = vmi.Experiment(runs=[Run.model_validate(SAME)], readout=CrossEntropy(answer="label"))
    own = vmi.execute(world.vit, experiment, world.columns, progress=False)
    assert own.logits.shape == (1, len(IMAGES))
    given = vmi.execute(world.vit, experiment, world.columns, progress=False, readout=SelectedLogits(classes=[0, 1]))
    assert given.logits.shape == (1, len(IMAGES), 2)
    assert vmi.plan(world.vit, experiment, world.columns).result_bytes == 4 * len(IMAGES)
    assert vmi.run_experiment(experiment, vit=world.vit, data=world.columns, progress=False).readout == experiment.readout


@pytest.mark.parametrize("readout", READOUTS[:3:2], ids=lambda readout: readout.op)
def test_a_backend_keeps_the_same(world: World, readout: Any) -> None:
    ours = world.execute(RUNS, readout=readout)
    theirs = world.execute(RUNS, readout=readout, backend="hooks", batch_size=3)
    check(world, theirs, readout)
    assert {name: theirs.provenance[name] for name in ("readout", "columns", "data")} == {
        name: ours.provenance[name] for name in ("readout", "columns", "data")
    }
