"""Interventions that nothing that is read can tell are left out, and rows whose base is replaced are their source's."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.world import Counted, World, world_of
from tests.tiny_models import HF_CLIP, HF_DINOV2, HF_VIT, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, Tiny
from vit_mechinterp import Run
from vit_mechinterp.engine.ops import register_operator
from vit_mechinterp.model.read_tokens import follows_from
from vit_mechinterp.spec import Intervention, Site, register_op

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


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED, HF_VIT, HF_DINOV2, HF_CLIP], ids=lambda t: t.name)
@pytest.mark.parametrize("site", ["embed", "blocks.1.resid_pre", "blocks.1.resid_mid", "blocks.1.resid_post"])
def test_a_run_whose_whole_stream_is_replaced_is_its_source(tiny: Tiny, site: str) -> None:
    world = world_of(tiny, 3)
    if site.split(".")[-1] in tiny.missing:
        return
    capture = (f"{LAST}.mlp_out", "embed", "blocks.0.attn.z")
    first = rows(world, run("a", push("embed", [1]), swap(site)) if tiny is TIMM_PLAIN else run("a", swap(site)))
    assert first == [3, 3, 3]
    captured = rows(world, run("a", swap(site), capture=capture))
    assert captured == ([3, 3, 3] if site == "embed" else [6, 3, 3])
    assert rows(world, run("a", swap(site), push("blocks.2.mlp_out", [1])) if tiny is TIMM_PLAIN else run("a", swap(site))) == [3, 3, 3]


def test_all_that_the_output_reads_is_all() -> None:
    world = world_of(TIMM_PLAIN, 3)
    assert rows(world, run("a", swap(f"{LAST}.resid_post", ["cls", 2]))) == [3, 3, 3]
    # But not where other tokens are captured: then the base's own are needed.
    capture = ({"site": f"{LAST}.resid_post", "tokens": ["cls", 7]},)
    edited = run("a", swap(f"{LAST}.resid_post", ["cls"]), capture=capture)
    results = world.execute([edited])
    output, values = world.oracle.run(edited)
    assert torch.allclose(results["a"], output, atol=1e-5 * world.scale)
    assert torch.allclose(results.captures["a"][f"{LAST}.resid_post"], values[f"{LAST}.resid_post"][:, [0, 8]], atol=1e-5)


def test_a_replaced_stream_can_come_from_anywhere() -> None:
    """From another place, other tokens, another run, the dataset or nowhere: rows start blank, and no base is run."""
    world = world_of(TIMM_PLAIN, 3)
    site = "blocks.1.resid_post"
    assert rows(world, run("a", swap(site, source_site="blocks.0.resid_post"))) == [3, 0, 3]
    assert rows(world, run("a", {"op": "ablate", "site": site})) == [0, 0, 1]  # nothing is left of any image
    assert rows(world, run("a", {"op": "ablate", "site": site, "method": "mean"})) == [3, 3, 1]
    assert rows(world, run("a", {"op": "ablate", "site": site, "method": "resample", "seed": 1}), effect=None) == [3, 3, 3]
    assert rows(world, run("a", {"op": "ablate", "site": "blocks.1.resid_mid"})) == [0, 1, 1]
    mixed = run("a", swap(site, source_site="blocks.0.resid_post"), swap(f"{LAST}.attn.z", ["cls"], "base"))
    assert rows(world, mixed) == [6, 3, 6]


def test_a_block_that_gives_something_of_its_input_keeps_its_base() -> None:
    """Where the middle of a block is replaced, but a hook of somebody else adds its input to what it returns."""
    world = World(TIMM_PLAIN, 3)
    world.module.blocks[1].register_forward_hook(lambda module, args, output: output + args[0])
    site, x = "blocks.1.resid_mid", world.columns["base"]
    with torch.no_grad():
        middle = world.vit.run(world.columns["source"], capture=[site])[1][site]
        with world.vit.hooks({site: lambda h: middle}):
            wanted = world.vit(x)
        source = world.vit(world.columns["source"])
    found = world.execute([run("a", swap(site))])["a"]
    assert torch.allclose(found, wanted, atol=1e-5 * world.scale)
    assert not torch.allclose(found, source, atol=1e-2 * world.scale)


def test_a_replaced_stream_of_another_run_goes_on_from_it() -> None:
    world = world_of(TIMM_PLAIN, 3)
    sender = run("sender", swap("blocks.0.mlp_out", [2]))
    whole = swap("blocks.1.resid_post", source={"run": "sender"})
    alone = rows(world, sender)
    assert rows(world, sender, run("same", whole, base="source"), effect=None) == alone
    captured = run("same", whole, base="source", capture=("blocks.2.mlp_out", "blocks.0.ln1", "blocks.1.attn.z"))
    with_own = rows(world, sender, captured, effect=None)
    assert with_own == [alone[0], alone[1] + 3, alone[2]]  # its own base, as far as it is captured
    further = run("further", whole, push(f"{LAST}.mlp_out", ["cls"]), base="source")
    assert rows(world, sender, further, effect=None) == [alone[0], alone[1], alone[2] + 3]
    # What the sender does later is not in it.
    late = run("sender", swap("blocks.0.mlp_out", [2]), push(f"{LAST}.mlp_out", ["cls"]))
    assert rows(world, late, run("same", whole, base="source"), effect=None) == [alone[0], alone[1], alone[2] + 3]
    for document in (captured, further):
        changed = world.oracle.run(document)[0] - world.oracle.clean("source")[0]
        assert float(changed.abs().max()) > 1e-3


def test_the_plan_says_where_runs_begin_alike() -> None:
    """Corrupt, then restore at every place: written as edits of every run, and as a run that the others go on from."""
    world = world_of(TIMM_PLAIN, 3)
    noise = push("embed", "patches", 3.0)
    restored = [(f"{layer}.{token}", swap(f"blocks.{layer}.resid_post", [token], "base")) for layer in (1, 2) for token in (1, 2)]
    alone = [run(name, noise, back) for name, back in restored]
    corrupt = run("corrupt", noise)
    on = [run(n, swap(back["site"], source={"run": "corrupt"}), back, base="base") for n, back in restored]
    note = "2 runs begin with interventions that other runs begin with too, and each runs the blocks up to its next one"
    vit, columns = world.vit, world.columns
    assert note in str(vmi.plan(vit, [Run.model_validate(document) for document in [corrupt, *alone]], columns))
    assert "begin with" not in str(vmi.plan(vit, [Run.model_validate(document) for document in [corrupt, *on]], columns))
    assert sum(rows(world, corrupt, *on)) < sum(rows(world, corrupt, *alone))


def test_a_base_that_another_run_reads_stays() -> None:
    world = world_of(TIMM_PLAIN, 3)
    replaced = run("replaced", push("blocks.0.mlp_out", [2]), swap("blocks.1.resid_post"))
    reader = run("reader", swap("blocks.1.ln1", ["cls"], {"run": "replaced"}, source_tokens=[2]), base="source")
    assert sum(rows(world, replaced, reader)) > sum(rows(world, replaced))
    hidden = run("hidden", swap(f"{LAST}.attn.z", [2]), swap(f"{LAST}.resid_post", ["cls"]))
    reader = run("reader", swap(f"{LAST}.mlp_out", ["cls"], {"run": "hidden"}), base="source")
    rows(world, hidden, reader)


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


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, TIMM_POOLED, HF_VIT, HF_DINOV2, HF_CLIP], ids=lambda t: t.name)
@pytest.mark.parametrize("site", ["ln_final", "pooled"])
def test_what_is_behind_the_blocks_can_be_all_that_is_read(tiny: Tiny, site: str) -> None:
    world = world_of(tiny, 3)
    if site in world.vit.layout.absent:
        return
    assert rows(world, run("a", swap(site))) == [3, 3, 3]
    if site == "ln_final":
        assert rows(world, run("a", swap(site, source_site="embed"))) == [0, 0, 0]
    if tiny is TIMM_PLAIN:
        assert rows(world, run("a", swap("ln_final", ["cls"]))) == [3, 3, 3]
        assert rows(world, run("a", swap("ln_final", [2])), effect=None) == [3, 3, 3]


def test_a_branch_of_the_output_is_not_all_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that adds something of the residual stream to what the pooled value gives."""
    world = World(TIMM_PLAIN, 3)
    assert follows_from(world.vit, Site(None, "pooled"))
    native = type(world.module).forward_head

    def forward_head(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = native(self, x, *args, **kwargs)
        return output + x.square().mean(dim=(1, 2))[:, None]

    forward_head.__module__ = native.__module__  # a foreign method would not be tried out at all
    monkeypatch.setattr(type(world.module), "forward_head", forward_head)
    assert not follows_from(world.vit, Site(None, "pooled"))
    assert follows_from(world.vit, Site(None, "ln_final"))


def test_logits_that_are_replaced_are_their_source() -> None:
    world = world_of(TIMM_PLAIN, 3)
    assert rows(world, run("a", push("blocks.0.mlp_out", [1]), swap("logits"))) == [3, 3, 3]
    assert rows(world, run("a", {"op": "ablate", "site": "logits"})) == [0, 0, 0]


def chosen_seed(n: int) -> int:
    """A seed whose permutation of n examples leaves one of them in its place."""
    return next(seed for seed in range(99) if (np.random.default_rng(seed).permutation(n) == np.arange(n)).any())


def test_a_stream_that_is_put_back_is_the_bases_own() -> None:
    """Resampled from the whole dataset, an example may be given its own image."""
    world = world_of(TIMM_PLAIN, 5)
    resampled = {"op": "ablate", "site": "blocks.0.resid_post", "method": "resample", "seed": chosen_seed(5)}
    plan = vmi.plan(world.vit, [Run.model_validate(run("a", resampled))], world.columns)
    assert plan.clean_rows == 1
    rows(world, run("a", resampled), effect=None)
    rows(world, run("a", resampled, push("blocks.1.mlp_out", [1]), capture=("blocks.0.resid_post", "blocks.2.ln1")), effect=None)


def test_edits_that_others_see_before_they_are_written_over_stay() -> None:
    world = world_of(TIMM_PLAIN, 3)
    whole = swap("blocks.1.resid_post")
    for site in ("blocks.0.mlp_out", "blocks.0.resid_post", "blocks.1.resid_mid"):
        rows(world, run("a", push("blocks.0.mlp_out", [1]), whole, capture=(site,)))
    pattern = "blocks.1.attn.pattern"
    noise = {**push(pattern, ["cls"]), "vector": "direction.17"}
    rows(world, run("a", noise, swap(pattern, ["cls"], keys=[1, 2])))
    rows(world, run("a", push("blocks.1.mlp_out", ["cls", 3]), swap("blocks.1.mlp_out", [3], "base")))


def test_chains_of_replaced_streams_keep_what_is_captured_in_between() -> None:
    world = World(TIMM_PLAIN, 3)
    world.columns["third"] = TIMM_PLAIN.images(3, 7)
    first = run("first", push("blocks.0.mlp_out", [1]))
    second = run("second", swap("blocks.0.resid_post", source={"run": "first"}), base="source")
    capture = ("blocks.0.ln1", "blocks.1.ln1", "blocks.1.mlp_out", "blocks.2.ln1")
    third = run("third", swap("blocks.1.resid_post", source={"run": "second"}), base="third", capture=capture)
    for documents in ((first, second, third), (third, second, first)):
        rows(world, *documents)
    blank = run("first", {"op": "ablate", "site": "blocks.0.resid_post"})
    rows(world, blank, second, third)


def test_somebody_elses_block_is_passed_by_whoever_goes_on_from_it() -> None:
    """A hook that acts on what block 0 returns acts on the rows of a run that takes another's stream, too."""
    world = World(TIMM_PLAIN, 3)
    world.module.blocks[0].register_forward_hook(lambda module, args, output: 1.1 * output)
    site = "blocks.0.mlp_out"
    documents = [run("sender", swap(site, [2])), run("same", swap("blocks.1.resid_post", source={"run": "sender"}), base="source")]
    with torch.no_grad():
        given = world.vit.run(world.columns["source"], capture=[site])[1][site]

        def edit(h: torch.Tensor) -> torch.Tensor:
            changed = h.clone()
            changed[:, 3] = given[:, 3]
            return changed

        with world.vit.hooks({site: edit}):
            wanted = world.vit(world.columns["base"])
    for order in (documents, documents[::-1]):
        results = world.execute(order)
        for name in ("sender", "same"):
            assert torch.allclose(results[name], wanted, atol=1e-5 * world.scale), name


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


@pytest.mark.parametrize("hooked", [(True, False), (False, True)])
def test_means_of_a_folder_are_those_of_the_sites_that_read_them(
    hooked: tuple[bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages, and with them the order of means, may be others where hooks on the model keep a base alive."""
    world = World(TIMM_PLAIN, 4)
    last = f"{LAST}.resid_post"

    def subspace(name: str) -> Document:
        return {"op": "inject_subspace", "site": last, "tokens": ["cls"], "basis": "basis.24", "source": {"run": name}}

    def mean(site: str) -> Document:
        return {"op": "ablate", "method": "mean", "site": site, "tokens": ["cls", 2]}

    documents = [
        run("w", push("blocks.0.mlp_out", [1])),
        run("x", swap(last, ["cls"], {"run": "w"}), base="source"),
        run("y", mean("blocks.1.mlp_out"), subspace("x")),
        run("z", mean("blocks.1.attn_out"), subspace("w")),
    ]
    options: dict[str, Any] = {"batch_size": 3, "memory": world.memory(documents, 2, 3), "out": tmp_path}

    def dying(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for first, own in zip((True, False), hooked, strict=True):
        handle = world.module.blocks[1].register_forward_hook(lambda module, args, output: None) if own else None
        with monkeypatch.context() as patch:
            if first:
                patch.setattr(importlib.import_module("vit_mechinterp.engine.execute"), "chunk_of", dying)
                with pytest.raises(KeyboardInterrupt):
                    world.execute(documents, **options)
            else:
                world.check(documents, world.execute(documents, **options))
        if handle is not None:
            handle.remove()
