"""Interventions that change nothing that is read are left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.world import Counted, World, world_of
from tests.tiny_models import TIMM_PLAIN, TIMM_POOLED
from tests.zoo.test_timm import tiny
from vit_mechinterp import Run
from vit_mechinterp.engine.binding.ops import register_operator
from vit_mechinterp.spec import Intervention, register_op

Document = dict[str, Any]
LAST = "blocks.2"


def swap(site: str, tokens: Any = "all", source: Any = "source", **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": source, "tokens": tokens, **fields}


def push(site: str, tokens: Any, alpha: float = 1.0) -> Document:
    return {"op": "add_direction", "site": site, "tokens": tokens, "vector": "direction.24", "alpha": alpha}


def run(name: str, *edits: Document, capture: tuple[Any, ...] = (), **fields: Any) -> Document:
    return {"name": name, "interventions": list(edits), "capture": list(capture), **fields}


def rows(world: World, *documents: Document, effect: float | None = 1e-4, **options: Any) -> list[int]:
    """Rows that pass through each block; what comes out is what the oracle says, and what the plan counts."""
    runs = [Run.model_validate(document) for document in documents]
    named = world.named(documents)
    plan = vmi.plan(world.vit, runs, world.columns, tensors=named)
    with Counted(world.module) as counted:
        results = world.execute(documents, **options)
    world.check(documents, results, effect=effect)
    assert options or counted.total == plan.block_evaluations
    return counted.rows


@pytest.mark.parametrize("site", ["attn.q", "attn.z", "attn_out", "resid_mid", "ln2", "mlp.post", "mlp_out", "resid_post"])
def test_edits_at_tokens_that_nobody_reads_are_clean_rows(site: str) -> None:
    world = world_of(TIMM_PLAIN, 3)
    assert rows(world, run("a", swap(f"{LAST}.{site}", [1, 4])), effect=None) == [3, 3, 3]
    assert rows(world, run("a", swap(f"{LAST}.{site}", {"box": "box"})), effect=None) == [3, 3, 3]
    # CLS is read, and so is a token that is captured from there on.
    assert rows(world, run("clean"), run("a", push(f"{LAST}.resid_mid", ["cls", 4]))) == [3, 3, 6]
    captured = run("a", swap(f"{LAST}.{site}", [1, 4]), capture=({"site": f"{LAST}.resid_post", "tokens": [4]},))
    results = world.execute([captured])
    values = world.oracle.run(captured)[1]
    assert torch.allclose(results.captures["a"][f"{LAST}.resid_post"], values[f"{LAST}.resid_post"][:, [5]], atol=1e-5)
    assert not torch.allclose(values[f"{LAST}.resid_post"], world.oracle.clean("base")[1][f"{LAST}.resid_post"], atol=1e-3)


def test_an_edit_may_reach_what_is_read_in_some_examples() -> None:
    world = World(TIMM_PLAIN, 4)
    world.columns["one"] = torch.tensor([[1], [2], [3], [4]])
    world.columns["other"] = torch.tensor([[1], [5], [3], [6]])
    capture = ({"site": f"{LAST}.resid_post", "tokens": {"column": "other"}},)
    edited = run("a", swap(f"{LAST}.mlp_out", {"column": "one"}), capture=capture)
    site = f"{LAST}.resid_post"
    plan = vmi.plan(world.vit, [Run.model_validate(edited)], world.columns)
    assert plan.clean_rows == 2
    results = world.execute([edited])
    assert torch.allclose(results["a"], world.oracle.clean("base")[0], atol=1e-5 * world.scale)
    places = 1 + world.columns["other"]
    wanted = world.oracle.run(edited)[1][site].take_along_dim(places[:, :, None], dim=1)
    found = torch.stack(list(results.captures["a"][site]))
    assert torch.allclose(found, wanted, atol=1e-5)
    native = world.oracle.clean("base")[1][site].take_along_dim(places[:, :, None], dim=1)
    assert [bool(x > 1e-3) for x in (found - native).abs().amax((1, 2))] == [True, False, True, False]


@pytest.mark.parametrize("site", ["resid_pre", "ln1", "attn.k", "attn.v"])
def test_edits_before_the_last_attention_call_reach_every_token(site: str) -> None:
    world = world_of(TIMM_PLAIN, 3)
    assert rows(world, run("a", swap(f"{LAST}.{site}", [1, 4]))) != [3, 3, 3]


def test_a_model_whose_output_reads_patches_is_edited_there() -> None:
    world = world_of(TIMM_POOLED, 3)
    assert rows(world, run("a", swap(f"{LAST}.mlp_out", [1, 4]))) == [6, 6, 6]
    plan = vmi.plan(world.vit, [Run.model_validate(run("a", swap(f"{LAST}.mlp_out", [1, 4])))], world.columns)
    assert "left out" not in str(plan)


def test_what_an_idle_edit_reads_is_not_computed() -> None:
    """Nor is what the runs do that it reads, unless somebody else reads it."""
    world = world_of(TIMM_PLAIN, 3)
    sender = run("sender", swap(f"{LAST}.mlp_out", [1]))
    assert rows(world, sender, run("reader", swap(f"{LAST}.resid_post", [1], {"run": "sender"})), effect=None) == [3, 3, 3]
    reading = run("reader", swap(f"{LAST}.resid_post", ["cls"], {"run": "sender"}, source_tokens=[1]))
    assert rows(world, sender, reading, effect=None) == [6, 6, 6]
    changed = world.oracle.run(reading)[0] - world.oracle.clean("base")[0]
    assert float(changed.abs().max()) > 1e-3


def test_an_idle_edit_parts_no_rows() -> None:
    """Beside an edit of the output before it, an edit of a block's input may be written as one of that output."""
    world, edit = world_of(TIMM_PLAIN, 3), swap("blocks.1.resid_pre", [1])
    seen = run("seen", edit, capture=("blocks.1.resid_pre",))
    assert rows(world, seen, run("beside", push("blocks.0.resid_post", [1], alpha=0.0), edit)) == [6, 3, 3]


def test_the_plan_names_what_is_left_out() -> None:
    world = world_of(TIMM_PLAIN, 3)
    documents = [run(f"layer{n}", swap(f"blocks.{n}.resid_post", [1, 4])) for n in range(3)]
    runs = [Run.model_validate(document) for document in documents]
    plan = vmi.plan(world.vit, runs, world.columns)
    assert plan.clean_runs == ("layer2",)
    assert "interventions that change nothing that is read are left out: run 'layer2', interchange at blocks.2.resid_post" in str(plan)
    assert "replaced" not in str(plan)
    whole = vmi.plan(world.vit, [Run.model_validate(run("whole", swap("blocks.1.resid_post")))], world.columns)
    assert "no base is run for it: whole is image 'source' from blocks.1.resid_post on" in str(whole)
    # Base to the end, source no further than the last block whose output is taken, and two layers' rows.
    assert rows(world, *documents, effect=None) == [6, 9, 9]


def test_values_that_are_written_over_at_once_are_not_made() -> None:
    world = world_of(TIMM_PLAIN, 3)
    site = "blocks.1.mlp_out"
    twice = run("twice", swap(site, ["cls", 3], source_site="blocks.0.mlp_out"), push(site, ["cls", 3]), swap(site, ["cls", 3]))
    once = run("once", swap(site, ["cls", 3]))
    assert rows(world, once) == rows(world, twice) == rows(world, once, twice)
    partly = run("partly", swap(site, ["cls", 3]), swap(site, [3], "base"))
    assert rows(world, once, partly) == [6, 6, 6]
    z = "blocks.1.attn.z"
    both, other = swap(z, heads=[0, 1]), swap(z, heads=[1], source_site="blocks.0.attn.z")
    assert rows(world, run("a", other, both), run("b", both)) == [6, 6, 3]
    assert rows(world, run("a", both, other), run("b", both)) == [6, 9, 6]


@pytest.mark.parametrize("field", ["vector", "gate"])
def test_tensors_of_zeros_change_nothing(field: str) -> None:
    world = World(TIMM_PLAIN, 3)
    world.tensors.update(nothing=torch.zeros(24), shut=torch.zeros(3))
    edit: Document = {"op": "inject_subspace", "site": "blocks.1.mlp_out", "basis": "basis.24", "source": "source"}
    edits = {
        "vector": {**push("blocks.1.mlp_out", "all"), "vector": "nothing"},
        "gate": {**edit, "gate": "shut"},
    }
    assert rows(world, run("a", edits[field]), effect=None) == [3, 3, 3]
    unknown = vmi.plan(world.vit, [Run.model_validate(run("a", edits[field]))], world.columns)
    assert unknown.clean_runs == ()
    assert rows(world, run("a", {**edit, "gate": "gate"})) == [6, 6, 3]


def test_without_data_a_column_selects_patches() -> None:
    vit = world_of(TIMM_PLAIN, 3).vit
    runs = [Run.model_validate(run(f"{n}", swap(f"blocks.{n}.resid_post", {"column": "here"}))) for n in range(3)]
    plan = vmi.plan(vit, runs)
    assert plan.clean_runs == ("2",)
    assert plan.block_evaluations == 3 + 2 + 2 + 1


def test_edits_that_others_see_before_they_are_written_over_stay() -> None:
    world = world_of(TIMM_PLAIN, 3)
    whole = swap("blocks.1.resid_post")
    for site in ("blocks.0.mlp_out", "blocks.0.resid_post", "blocks.1.resid_mid"):
        rows(world, run("a", push("blocks.0.mlp_out", [1]), whole, capture=(site,)))
    pattern = "blocks.1.attn.pattern"
    noise = {**push(pattern, ["cls"]), "vector": "direction.17"}
    rows(world, run("a", noise, swap(pattern, ["cls"], keys=[1, 2])))
    rows(world, run("a", push("blocks.1.mlp_out", ["cls", 3]), swap("blocks.1.mlp_out", [3], "base")))


@pytest.mark.parametrize("by_token", [True, False])
def test_what_an_operator_of_ones_own_makes_of_a_value_stays(by_token: bool) -> None:
    """It may take it to other heads (or tokens), where it is not written over."""
    world = World(TIMM_PLAIN, 3)
    vit, site, v = world.vit, "blocks.1.attn.z", world.tensors["direction.8"]
    name = f"mixed_heads_{by_token}"

    @register_op
    class Mixed(Intervention):
        """Every head becomes the mean of all."""

        op: Any = name

    @register_operator(Mixed, by_token=by_token)
    def mixed(spec: Mixed, h: torch.Tensor, inputs: Any) -> torch.Tensor:
        return h.mean(dim=1, keepdim=True).expand_as(h)

    added = vmi.AddDirection(site=site, tokens=["cls"], heads=[0], vector=vmi.TensorRef("v"))
    put = vmi.Interchange(site=site, tokens=["cls"], heads=[0], source="source")
    edited = Run(name="a", interventions=[added, Mixed(site=site, tokens=["cls"]), put])
    found = vmi.execute(vit, [edited], world.columns, {"v": v}, progress=False)["a"]
    with torch.no_grad():
        given = vit.run(world.columns["source"], capture=[site])[1][site]

        def edit(h: torch.Tensor) -> torch.Tensor:
            changed = h.clone()
            changed[:, 0, 0] += v
            changed[:, 0] = changed[:, 0].mean(dim=1, keepdim=True)
            changed[:, 0, 0] = given[:, 0, 0]
            return changed

        with vit.hooks({site: edit}):
            wanted = vit(world.columns["base"])
    assert torch.allclose(found, wanted, atol=1e-5 * world.scale)


def test_without_data_columns_are_not_taken_for_each_other() -> None:
    world = world_of(TIMM_PLAIN, 3)
    site = "blocks.1.mlp_out"
    here, there = swap(site, {"column": "here"}, source_tokens={"column": "there"}), swap(site, {"column": "there"}, "base")
    runs = [Run.model_validate(run("a", here, there))]
    assert vmi.plan(world.vit, runs).block_evaluations * 3 == vmi.plan(world.vit, runs, world.columns).block_evaluations
    captured = run("a", swap(f"{LAST}.mlp_out", [5]), capture=({"site": f"{LAST}.resid_post", "tokens": {"column": "here"}},))
    assert vmi.plan(world.vit, [Run.model_validate(captured)]).clean_runs == ()


def test_what_is_read_inside_a_block_that_somebody_else_acts_on_is_made() -> None:
    """Its output is replaced, but a capture before that reads what is edited before."""
    world = World(TIMM_PLAIN, 3)
    edited = run("a", {"op": "ablate", "site": "blocks.0.ln1"}, swap("blocks.1.resid_pre"), capture=("blocks.0.mlp_out",))
    without = world.execute([edited]).captures["a"]["blocks.0.mlp_out"]
    handle = world.module.blocks[0].register_forward_hook(lambda module, args, output: output * 1.0)  # type: ignore[union-attr]
    try:
        within = world.execute([edited]).captures["a"]["blocks.0.mlp_out"]
    finally:
        handle.remove()
    assert torch.allclose(within, without, atol=1e-5)
    clean = world.oracle.clean("base")[1]["blocks.0.mlp_out"]
    assert float((without - clean).abs().max()) > 1e-3


def test_talking_heads_hear_of_each_other() -> None:
    """A pattern of one head reaches all heads behind it, so what is done to it stays where that head alone is replaced."""
    vit = tiny("cait_xxs24_224")
    draw = torch.Generator().manual_seed(0)
    images = {name: torch.randn(2, *vit.layout.tokens.input_shape, generator=draw) for name in ("base", "source")}
    given = vit.run(images["source"], capture=["blocks.0.attn.z"])[1]["blocks.0.attn.z"]

    def silent(pattern: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(pattern[:, :1]), pattern[:, 1:]], dim=1)

    def swapped(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([given[:, :, :1], z[:, :, 1:]], dim=2)

    runs = [Run.model_validate(run("a", {"op": "ablate", "site": "blocks.0.attn.pattern", "heads": [0]}, swap("blocks.0.attn.z", heads=[0])))]
    found = vmi.execute(vit, runs, images, progress=False)["a"]
    with torch.no_grad(), vit.hooks({"blocks.0.attn.z": swapped}):
        less = vit(images["base"])
        with vit.hooks({"blocks.0.attn.pattern": silent}):
            wanted = vit(images["base"])
    scale = float(wanted.abs().max())
    assert torch.allclose(found, wanted, atol=1e-5 * scale)
    assert float((wanted - less).abs().max()) > 1e-4 * scale
