"""Nothing is computed twice: equal images, equal rows, and rows that no edit can change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.experiments import hold_nothing
from tests.engine.world import Counted, World, world_of
from tests.tiny_models import HF_DINOV2, TIMM_PLAIN, Tiny
from vit_mechinterp import Run

Document = dict[str, Any]


def swap(site: str, source: Any = "source", **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": source, "tokens": ["cls", 2], **fields}


def add(site: str, d: int, alpha: float) -> Document:
    return {"op": "add_direction", "site": site, "vector": f"direction.{d}", "alpha": alpha}


def run(name: str, *edits: Document, **fields: Any) -> Document:
    return {"name": name, "interventions": list(edits), **fields}


def repeating(tiny: Tiny = TIMM_PLAIN) -> World:
    """Six examples: the third and the last are the first again, the fifth swaps with itself, and two examples
    have one source."""
    world = World(tiny, 6)
    for column in ("base", "source", "here", "there", "kind", "box", "source_box"):
        for example in (2, 5):
            world.columns[column][example] = world.columns[column][0]
    world.columns["source"][4] = world.columns["base"][4]
    world.columns["source"][3] = world.columns["source"][1]
    world.vit.sites()
    return world


def counted(world: World, documents: list[Document], **options: Any) -> tuple[int, vmi.Plan]:
    """(row, block) pairs that run, after a check of the results and of the plan."""
    runs = [Run.model_validate(document) for document in documents]
    plan = vmi.plan(world.vit, runs, world.columns, tensors=world.named(documents), **options)
    with Counted(world.module) as count:
        results = world.execute(documents, **options)
    world.check(documents, results, effect=None)
    assert count.total == plan.block_evaluations
    assert count.launches == plan.launches
    return count.total, plan


def test_one_image_passes_once_whatever_column_it_stands_in() -> None:
    world = world_of(TIMM_PLAIN, 4)
    world.vit.sites()
    data = {"base": world.columns["base"], "source": world.columns["base"].flip(0), "other": world.columns["base"]}
    runs = [vmi.Run(name=column, base=column) for column in data]
    with Counted(world.module) as count:
        results = vmi.execute(world.vit, runs, data, progress=False)
    assert count.rows == [4, 4, 4]
    assert torch.equal(results["base"], results["other"])
    assert torch.equal(results["base"].flip(0), results["source"])
    assert torch.allclose(results["base"], world.oracle.clean("base")[0], atol=1e-5 * world.scale)


def test_pictures_and_files_are_compared_by_their_contents(tmp_path: Any) -> None:
    import datasets

    vit = World(TIMM_PLAIN, 4).vit
    vit.sites()
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (3, 32, 32, 3), generator=draw, dtype=torch.uint8)
    pictures = [PIL.Image.fromarray(p.numpy()) for p in pixels]
    columns = {"base": [pictures[0], pictures[1].copy(), pictures[1]], "source": [pictures[2], pictures[0], pictures[2]]}
    features = datasets.Features({"base": datasets.Image(), "source": datasets.Image()})
    runs = [vmi.Run(name="a"), vmi.Run(name="b", base="source")]
    vit._preprocess = _Plain()  # type: ignore[assignment]
    for data in (columns, datasets.Dataset.from_dict(columns, features)):
        with Counted(vit.module) as count:
            logits = vmi.execute(vit, runs, data, progress=False).logits
        assert count.rows == [3, 3, 3]
        assert torch.equal(logits[0, 1], logits[0, 2])
        assert torch.equal(logits[0, 0], logits[1, 1])
        assert not torch.equal(logits[0, 0], logits[0, 1])


def test_images_that_agree_in_a_sample_are_told_apart() -> None:
    world = world_of(TIMM_PLAIN, 4)
    world.vit.sites()
    base = torch.zeros(3, 3, 32, 32)
    base[1, 0, 0, 1] = base[2, 0, 0, 1] = 3.0
    with Counted(world.module) as count:
        logits = vmi.execute(world.vit, [vmi.Run(name="a")], {"base": base}, progress=False).logits[0]
    assert count.rows == [2, 2, 2]
    assert torch.equal(logits[1], logits[2])
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)


def test_repeated_examples_are_rows_that_are_computed_once() -> None:
    world = repeating()
    total, plan = counted(world, [run("a", swap("blocks.0.resid_post"), capture=["blocks.1.attn.z"])])
    # Distinct: examples 0, 1, 3; the fifth is clean, so its image goes to the end.
    clean = 4 * 1 + 2 + 2  # four base images (one of them a source) and two more sources, and the clean one's rest
    assert total == clean + 3 * 2
    assert plan.shared_rows == 2
    assert plan.clean_rows == 1
    assert "2 rows equal to others, computed once" in str(plan)
    assert "1 row of other runs that no edit changes, answered by clean forwards" in str(plan)


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_equal_runs_are_computed_once_and_keep_their_own_captures(tiny: Tiny) -> None:
    world = world_of(tiny, 4)
    edit = swap("blocks.1.attn.z", heads=[1])
    documents = [
        run("a", edit, capture=["blocks.1.mlp_out"]),
        run("b", edit, capture=["blocks.2.attn.pattern", "blocks.0.ln1", "blocks.1.mlp_out"]),
        run("c", {**edit, "source_tokens": ["cls", 2], "source_site": "blocks.1.attn.z"}),
        run("other", swap("blocks.1.attn.z", heads=[0], tokens=[1])),
        run("reads b", swap("blocks.2.resid_post", {"run": "b"})),
    ]
    total, plan = counted(world, documents)
    # Clean: base to block 1 (to the end where its patches are read there), source to block 1. Rows: two runs from block 1
    # on; where the output reads CLS alone, the last run is run b's over again.
    assert plan.shared_rows == (12 if tiny is TIMM_PLAIN else 8)
    assert total == 4 * ((1 if tiny is TIMM_PLAIN else 3) + 2) + 4 * 2 * 2


@pytest.mark.parametrize(
    "edit",
    [
        add("blocks.0.ln1", 24, 0.0),
        {"op": "inject_subspace", "site": "blocks.1.mlp_out", "basis": "basis.24", "gate": "none", "source": "source"},
        swap("blocks.1.attn.pattern", "base", keys=["patches"]),
        {"op": "inject_subspace", "site": "blocks.1.resid_mid", "basis": "basis.24", "source": "base"},
        swap("blocks.0.mlp_out", {"run": "clean"}),
        swap("blocks.2.resid_post", {"run": "nothing"}),
    ],
    ids=lambda edit: f"{edit['op']} at {edit['site']}",
)
def test_rows_that_nothing_changes_are_clean(edit: Document) -> None:
    world = world_of(TIMM_PLAIN, 4)
    world.tensors["none"] = torch.zeros(3)
    others = [run("clean"), run("nothing", add("blocks.1.ln1", 24, 0.0))]
    documents = [*others, run("a", edit, capture=["blocks.2.attn.z", "blocks.0.mlp_out"])]
    total, plan = counted(world, documents)
    assert total == 4 * 3
    assert plan.clean_runs == ("clean", "nothing", "a")
    assert plan.rows == ()


def test_what_puts_a_changed_value_back_is_no_idle_edit() -> None:
    world = world_of(TIMM_PLAIN, 4)
    documents = [
        run("restored", swap("blocks.0.resid_post", tokens=["cls", 2, 5]), swap("blocks.1.mlp_out", "base")),
        run("pushed", add("blocks.0.resid_post", 24, 1.0), add("blocks.1.ln1", 24, 0.0)),
    ]
    _, plan = counted(world, documents)
    assert [rows.edits for rows in plan.rows] == [
        ("interchange at blocks.0.resid_post", "interchange at blocks.1.mlp_out"),
        ("add_direction at blocks.0.resid_post",),
    ]


@pytest.mark.parametrize("idle", ["first", "second"])
def test_a_stage_may_hold_no_row_that_anything_changes(idle: str) -> None:
    """Rows of one stage repeat, and all rows of the other are clean."""
    world = repeating()
    repeated = swap("blocks.0.resid_post")
    if idle == "first":
        # The value of an idle run is read; what reads it, and an equal run, are all there is to compute.
        read = run("read", swap("blocks.1.resid_post", "base", tokens=["cls"]), add("blocks.2.resid_mid", 24, 0.0))
        late = swap("blocks.2.resid_mid", {"run": "read"}, source_site="blocks.1.resid_post")
        documents = [read, run("a", late), run("b", late)]
    else:
        # The values of a run that nothing changes are put back where they come from.
        read = run("read", swap("blocks.0.resid_pre", "base"))
        back = swap("blocks.1.resid_mid", {"run": "read"})
        documents = [read, run("a", repeated), run("b", repeated), run("back", back)]
    counted(world, documents)
    counted(world, documents, batch_size=2, memory=world.memory(documents, 2, 2))


def test_rows_join_behind_the_edits_that_do_nothing_to_them() -> None:
    world = repeating()
    documents = [
        run(
            "a",
            swap("blocks.0.resid_post"),
            add("blocks.1.resid_post", 24, 1.0),
            capture=["blocks.0.attn.z", "blocks.0.resid_post", "blocks.1.resid_post", "blocks.2.attn.z"],
        ),
        run("reader", swap("blocks.2.resid_post", {"run": "a"}, source_site="blocks.1.resid_post")),
        run("early reader", swap("blocks.2.mlp_out", {"run": "a"}, source_site="blocks.0.resid_post")),
    ]
    _, plan = counted(world, documents)
    assert [(rows.joins, rows.examples) for rows in plan.rows if rows.run == "a"] == [
        ("the output of block 1", 1),
        ("the output of block 0", 5),
    ]
    for batch_size in (1, 4):
        counted(world, documents, batch_size=batch_size)


def test_chunks_do_not_share_and_the_plan_says_so() -> None:
    world = repeating()
    documents = [
        run("a", swap("blocks.0.resid_post"), capture=["blocks.1.attn.z"]),
        run("b", {"op": "ablate", "site": "blocks.1.attn.z", "method": "mean"}),
    ]
    memory = world.memory(documents, 2, 3)
    total, plan = counted(world, documents, batch_size=3, memory=memory)
    assert plan.chunk == 2
    assert total > counted(world, documents, batch_size=3)[0]
    assert "pass through the model" in str(plan)
    assert "rows are equal to rows of other chunks, and are computed again" in str(plan)


def test_beginnings_are_shared_in_a_chunk_and_the_plan_says_so() -> None:
    """Three rows of one image part where they swap with three others: in three chunks, each begins anew."""
    world = repeating()
    world.columns["source"] = TIMM_PLAIN.images(6, seed=11)
    documents = [run("a", add("blocks.0.resid_post", 24, 1.0), swap("blocks.1.resid_post"))]
    memory = world.memory(documents, 2, 3)
    total, plan = counted(world, documents, batch_size=3, memory=memory)
    assert plan.chunk == 2
    assert "go through before they differ is computed in each of these (2 times more in all), because" in str(plan)
    together, plan = counted(world, documents, batch_size=3)
    assert plan.chunk == 6
    assert "before they differ" not in str(plan)
    clean = sum(forward.images * forward.blocks for forward in plan.clean)
    assert together == clean + 4 * 1 + 6 * 1  # block 1 of four images, block 2 of six rows
    assert total >= together + 2


def test_a_row_that_ends_as_another_chunks_row_begins_is_computed_in_both_and_the_plan_says_so() -> None:
    world = World(TIMM_PLAIN, 4)
    world.columns["source"][3] = world.columns["base"][0]
    shifted = add("embed", 24, 1.0)
    documents = [run("ends", shifted), run("goes on", shifted, swap("blocks.1.resid_post", "base"), base="source")]
    memory = world.memory(documents, 2, 3)
    total, plan = counted(world, documents, batch_size=3, memory=memory)
    assert plan.chunk == 2
    assert "computed in each of these (once more in all)" in str(plan)
    together, plan = counted(world, documents, batch_size=3)
    assert "before they differ" not in str(plan)
    assert total > together


def test_two_edits_without_a_block_between_them_are_no_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    hold_nothing(monkeypatch)
    world = World(TIMM_PLAIN, 4)
    world.columns["base"][3] = world.columns["base"][0]
    chosen = {**add("blocks.0.resid_post", 24, 1.0), "vector": "kinds.24", "choose": {"column": "kind"}}
    world.columns["kind"] = torch.tensor([0, 1, 2, 3])
    documents = [run("two", add("blocks.0.resid_post", 24, 1.0), chosen)]
    _, plan = counted(world, documents, batch_size=3, memory=world.memory(documents, 2, 3))
    assert plan.chunk == 2
    assert "before they differ" not in str(plan)


def test_clean_values_are_made_for_the_examples_whose_rows_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second chunk, the rows of "deep" are copies for the first example, which goes no deeper than
    "shallow" needs."""
    hold_nothing(monkeypatch)
    world = World(TIMM_PLAIN, 4)
    world.columns["other"] = TIMM_PLAIN.images(4, seed=11)
    for column in ("base", "source"):
        world.columns[column][2] = world.columns[column][0]
    documents = [run("deep", swap("blocks.1.resid_post")), run("shallow", swap("blocks.0.resid_post", "other"))]
    total, plan = counted(world, documents, batch_size=3, memory=world.memory(documents, 2, 3))
    assert plan.chunk == 2
    first = (2 * 2 + 2 * 2 + 2 * 1) + (2 * 1 + 2 * 2)  # base, source and other; rows of both runs
    second = (1 + 2) + 2 + 2 * 1 + (1 * 1 + 2 * 2)
    assert total == first + second


def test_seeds_that_draw_the_same_images_are_one_ablation() -> None:
    world = World(TIMM_PLAIN, 2)
    turned = [seed for seed in range(20) if np.random.default_rng(seed).permutation(2)[0] == 1][:2]
    edit = {"op": "ablate", "site": "blocks.0.attn_out", "method": "resample"}
    documents = [run(f"{seed}", {**edit, "seed": seed}) for seed in turned]
    assert counted(world, documents)[0] == counted(world, documents[:1])[0]


def test_choices_are_compared_by_their_numbers() -> None:
    world = World(TIMM_PLAIN, 4)
    world.columns["again"] = world.columns["kind"].clone()
    world.columns["other"] = (world.columns["kind"] + 1) % 4
    edit = {"op": "add_direction", "site": "blocks.1.mlp_out", "tokens": ["cls"], "vector": "kinds.24"}
    documents = [run(column, {**edit, "choose": {"column": column}}) for column in ("kind", "again", "other")]
    total, plan = counted(world, documents)
    assert plan.shared_rows == 4
    assert total == 4 * 2 + 2 * 4 * 1


def test_rows_equal_to_rows_of_earlier_chunks_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only outputs are wanted; in memory, in a folder, and after a stop."""
    hold_nothing(monkeypatch)
    world = repeating()
    documents = [
        run("a", swap("blocks.0.resid_post")),
        run("b", swap("blocks.1.resid_post", {"run": "a"}), swap("blocks.1.attn.z", heads=[0], tokens=[1])),
        run("c", swap("blocks.0.resid_post"), swap("blocks.2.mlp_out")),
        run("d", swap("blocks.2.mlp_out"), swap("blocks.0.resid_post")),
    ]
    memory = world.memory(documents, 2, 3)
    total, plan = counted(world, documents, batch_size=3, memory=memory)
    assert plan.chunk == 2
    # Run "a" is read by "b", so its rows of examples 2 and 5 are computed again; those of the others are not.
    assert "2 rows are equal to rows of other chunks, and are computed again, because" in str(plan)
    clean = sum(forward.images * forward.blocks for forward in plan.clean)
    rows = {"a": 5 * 2, "b": 3 * 2, "c": 3 * 0}  # "c" goes on from "a"
    assert total == clean + sum(rows.values())
    whole = world.execute(documents, batch_size=3, memory=memory)
    for _ in range(2):
        results = world.execute(documents, batch_size=3, memory=memory, out=tmp_path)
        assert torch.equal(results.logits, whole.logits)
    assert torch.equal(whole["c"], whole["d"])
    assert torch.equal(whole["c"][0], whole["c"][5])


def test_a_plan_without_data_supposes_that_images_differ() -> None:
    world = world_of(TIMM_PLAIN, 4)
    documents = [
        run("resampled", {"op": "ablate", "site": "blocks.1.mlp_out", "method": "resample"}),
        run("columns", swap("blocks.1.resid_post", "base", tokens={"column": "here"}, source_tokens={"column": "there"})),
        run("idle", swap("blocks.1.resid_post", "base", tokens={"column": "here"})),
    ]
    plan = vmi.plan(world.vit, list(map(Run.model_validate, documents)))
    assert plan.clean_runs == ("idle",)
    gate = {"op": "inject_subspace", "site": "blocks.1.mlp_out", "basis": "b", "gate": "g", "source": "source"}
    assert "tensors are not known here" in str(vmi.plan(world.vit, [Run.model_validate(run("a", gate))]))


class _Plain:
    """A preprocessing that leaves sizes alone."""

    def __call__(self, images: list[PIL.Image.Image]) -> torch.Tensor:
        import numpy as np

        return torch.stack([torch.as_tensor(np.asarray(i, dtype=np.float32) / 255).permute(2, 0, 1) for i in images])


def test_a_blocks_input_is_the_output_of_the_one_before() -> None:
    """Sweeps over both are one, but where somebody reads one of them of an edited run, or acts on them."""
    world = World(TIMM_PLAIN, 3)
    pre = [run(f"pre {n}", swap(f"blocks.{n}.resid_pre", tokens=[2])) for n in (1, 2)]
    post = [run(f"post {n}", swap(f"blocks.{n}.resid_post", tokens=[2])) for n in (0, 1)]
    world.vit.sites()
    alone, _ = counted(world, pre)
    both, plan = counted(world, [*pre, *post])
    assert (both, plan.shared_rows) == (alone, 6)
    again = [swap("blocks.1.resid_pre", tokens=[2]), add("blocks.1.resid_post", 24, 1.0)]
    begun, _ = counted(world, [*pre, run("further", *again)])
    assert begun == alone + 3  # its own last block
    seen = [{**document, "capture": ["blocks.0.resid_post", "blocks.1.resid_pre", "blocks.1.ln1"]} for document in (pre[0], post[0])]
    _, plan = counted(world, seen)
    assert plan.shared_rows == 0
    world.module.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    plan = vmi.plan(world.vit, [Run.model_validate(document) for document in [*pre, *post]], world.columns)
    assert plan.shared_rows == 0


@pytest.mark.parametrize(
    "pair",
    [
        (swap("embed", tokens=[1]), swap("blocks.0.resid_pre", tokens=[1])),
        (swap("blocks.0.attn.z", tokens=[1, 2]), swap("blocks.0.attn.z", tokens=[2, 1])),
        (swap("blocks.0.attn.z", tokens=[1, 2]), swap("blocks.0.attn.z", tokens={"column": "two"})),
        ({"op": "ablate", "site": "blocks.1.ln2", "tokens": [3, 1]}, {"op": "ablate", "site": "blocks.1.ln2", "tokens": [1, 3]}),
    ],
    ids=["embedding", "order", "column", "ablation"],
)
def test_what_is_written_otherwise_and_means_the_same_is_computed_once(pair: tuple[Document, Document]) -> None:
    world = World(TIMM_PLAIN, 3)
    world.columns["two"] = torch.tensor([[1, 2]] * 3)
    world.vit.sites()
    alone, _ = counted(world, [run("a", pair[0])])
    both, plan = counted(world, [run("a", pair[0]), run("b", pair[1])])
    assert (both, plan.shared_rows) == (alone, 3)
    if "source" in pair[0]:  # tokens that are paired with others are in an order of their own
        crossed = [{**edit, "source_tokens": [4, 5]} for edit in pair]
        _, plan = counted(world, [run("a", crossed[0]), run("b", crossed[1])]) if pair[0]["tokens"] == [1, 2] else (0, None)
        assert plan is None or plan.shared_rows == (3 if pair[1]["tokens"] == {"column": "two"} else 0)
