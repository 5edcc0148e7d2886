"""Many interventions in one run, and runs that read one another: order, sources at other sites, path patching."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.world import world_of
from tests.oracles import Oracle
from tests.tiny_models import HF_DINOV2, HF_VIT, MAIN, TIMM_PLAIN, Tiny
from vit_mechinterp import Run
from vit_mechinterp.errors import SpecError

Document = dict[str, Any]


def swap(site: str, source: Any = "source", **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": source, "tokens": ["cls", 2, 5], **fields}


def add(site: str, d: int, alpha: float = 1.0, **fields: Any) -> Document:
    return {"op": "add_direction", "site": site, "vector": f"direction.{d}", "alpha": alpha, **fields}


def run(name: str, *edits: Document, **fields: Any) -> Document:
    return {"name": name, "interventions": list(edits), **fields}


@pytest.mark.parametrize("tiny", MAIN, ids=lambda tiny: tiny.name)
def test_several_interventions_in_one_run(tiny: Tiny) -> None:
    world = world_of(tiny, 4)
    d, d_head = world.module_width, world.shape("blocks.0.attn.q")[-1]
    edits = [
        add("blocks.2.mlp.post", world.shape("blocks.2.mlp.post")[-1], tokens=["cls"]),
        swap("blocks.0.attn.pattern", heads=[1], keys=["patches"]),
        {"op": "inject_subspace", "site": "blocks.1.resid_mid", "basis": f"basis.{d}", "source": "source",
         "tokens": {"column": "here"}, "source_tokens": {"column": "there"}},
        {"op": "ablate", "site": "blocks.1.attn.result", "method": "mean", "heads": [0]},
        add("embed", d, 0.3, tokens={"box": "box"}),
        {"op": "ablate", "site": "blocks.1.attn.q", "method": "resample", "seed": 2, "tokens": [1, 4]},
        add("blocks.1.attn.z", d_head, -1.0, heads=[1, 0], tokens=["cls", 0]),
        swap("blocks.2.resid_post", tokens=["cls"], source_tokens=[3]),
    ]  # fmt: skip
    runs = [run("all", *edits), run("reversed", *reversed(edits))]
    runs += [run(f"{i}{j}", edits[i], edits[j]) for i, j in itertools.combinations(range(len(edits)), 2)]
    results = world.execute(runs, batch_size=32)
    world.check(runs, results)
    assert results["all"].equal(results["reversed"])  # forward order, whatever the order of the list


@pytest.mark.parametrize(
    "site", ["embed", "blocks.1.attn.pattern", "blocks.1.attn.result", "blocks.1.mlp_out", "logits"]
)
def test_list_order_counts_at_one_site(site: str) -> None:
    world = world_of(HF_VIT)
    tokens: Document = {} if site == "logits" else {"tokens": ["cls", 1]}
    zero, push = {"op": "ablate", "site": site, **tokens}, add(site, world.shape(site)[-1], **tokens)
    runs = [run("zero first", zero, push), run("push first", push, zero), run("twice", push, push)]
    results = world.execute(runs)
    world.check(runs, results)
    assert float((results["zero first"] - results["push first"]).abs().max()) > 1e-3 * world.scale


def test_an_edit_behind_a_block_comes_before_one_in_front_of_the_next() -> None:
    world = world_of(TIMM_PLAIN)
    push, zero = (
        add("blocks.0.resid_post", 24),
        {"op": "ablate", "site": "blocks.1.resid_pre", "tokens": ["cls"]},
    )
    runs = [
        run("a", zero, push, capture=["blocks.0.resid_post", "blocks.1.resid_pre", "blocks.1.ln1"]),
        run(
            "b",
            {**zero, "site": "blocks.0.resid_pre"},
            add("embed", 24),
            capture=["embed", "blocks.0.resid_pre"],
        ),
    ]
    world.check(runs, world.execute(runs))


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_sources_at_other_sites(tiny: Tiny) -> None:
    world, d = world_of(tiny), world_of(tiny).module_width
    runs = [
        run("earlier", swap("blocks.2.resid_mid", source_site="blocks.0.resid_post")),
        run("later", swap("blocks.0.resid_post", source_site="blocks.2.resid_post")),
        run("of itself", swap("blocks.1.resid_post", "base", source_site="blocks.0.resid_pre")),
        run("head to head", swap("blocks.2.attn.k", source_site="blocks.0.attn.q", heads=[1])),
        run("pattern", swap("blocks.2.attn.pattern", source_site="blocks.0.attn.pattern", tokens="all")),
        run("scores", swap("blocks.1.attn.scores", "base", source_site="blocks.0.attn.pattern")),
        run("last norm", swap("blocks.1.mlp_out", source_site="ln_final")),
        run("subspace", {"op": "inject_subspace", "site": "blocks.1.ln2", "source_site": "embed", "source": "source",
                         "basis": f"basis.{d}", "tokens": [1, 2], "source_tokens": ["cls", 2]}),
        run("on the source's image", swap("blocks.1.attn.v", "base"), base="source"),
    ]  # fmt: skip
    world.check(runs, world.execute(runs))


@pytest.mark.parametrize("chunk", [64, 2])
@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_path_patching_is_a_document(tiny: Tiny, chunk: int) -> None:
    """A sender's edited value is put into a receiver; everything else of the receiver stays as it was."""
    world, d = world_of(tiny, 5), world_of(tiny, 5).module_width
    sender = {"run": "sender"}
    runs = [
        run("receiver", swap("blocks.1.attn.q", sender, heads=[0])),
        run("receiver at the same site", swap("blocks.0.attn.z", sender, heads=[1])),
        run("sender", swap("blocks.0.attn.z", tokens="all", heads=[1])),
        run("clean there", swap("blocks.1.resid_pre", {"run": "sender on source"}, source_site="embed")),
        run("sender on source", add("blocks.0.ln1", d), base="source"),
        run("ragged", swap("blocks.1.mlp_out", sender, tokens={"box": "box"})),
        run("across sites", swap("blocks.2.resid_pre", sender, source_site="blocks.1.resid_mid")),
        run("mlp", swap("blocks.1.mlp_out", sender, tokens=["cls"]), add("blocks.1.mlp_out", d, 0.2)),
        run("second link", swap("blocks.2.attn.v", {"run": "receiver"})),
        run("third link", swap("blocks.2.resid_post", {"run": "second link"}, tokens=["cls", 2])),
        run("of an mlp", swap("blocks.1.mlp_out", {"run": "mlp"}, tokens="all")),
        run("two senders", swap("blocks.1.ln1", sender), swap("blocks.2.ln1", {"run": "third link"}, source_site="embed")),
        run("of a clean run", swap("blocks.1.resid_post", {"run": "clean"})),
        {"name": "clean", "base": "source"},
        run("output", swap("logits", {"run": "receiver"}, tokens="all"), base="source"),
    ]  # fmt: skip
    results = world.execute(runs, batch_size=chunk)
    world.check(runs, results)
    assert float((results["output"] - results["receiver"]).abs().max()) <= 1e-5 * world.scale


def test_a_source_run_must_exist_and_must_not_read_its_reader() -> None:
    world = world_of(TIMM_PLAIN)
    site = "blocks.1.resid_post"
    cycle = [
        run("first", swap(site, {"run": "second"})),
        run("second", swap(site, {"run": "third"})),
        run("third", swap(site, {"run": "first"})),
    ]
    with pytest.raises(SpecError, match=r"in a cycle: first -> second -> third -> first\. Break it"):
        world.execute(cycle)
    with pytest.raises(SpecError, match="in a cycle: alone -> alone"):
        world.execute([run("alone", swap(site, {"run": "alone"}))])
    with pytest.raises(SpecError, match=r"reads run 'secnd', which is not part .* Close matches: second\."):
        world.execute([run("first", swap(site, {"run": "secnd"})), run("second", swap(site))])


def test_long_chains_of_runs() -> None:
    world = world_of(TIMM_PLAIN)
    chain = [
        run(
            str(n),
            *(swap("blocks.2.mlp_out", {"run": str(m)} if m >= 0 else "source") for m in (n - 1, n - 2)),
        )
        for n in range(1100)
    ]
    runs = [Run.model_validate(document) for document in chain]
    assert (
        vmi.plan(world.vit, runs[::-1]).block_evaluations == 6
    )  # both images; nothing runs behind the last block
    assert vmi.plan(world.vit, runs[:60]).naive_forwards > 10**12
    results = world.execute(chain[29::-1])
    assert torch.allclose(results["29"], results["0"], atol=1e-5 * world.scale)
    world.check(chain[:8], results)


def test_interchange_with_itself_changes_nothing() -> None:
    world = world_of(HF_VIT)
    runs = [run(site, swap(site, "base", tokens="all")) for site in world.sites[:-3]]
    results = world.execute([*runs, {"name": "clean"}])
    for name in results.run_names:
        assert float((results[name] - results["clean"]).abs().max()) <= 1e-6 * world.scale, name


def test_the_oracle_reads_edited_values() -> None:
    """Guards the tests above: a sender's edit reaches its receiver in the oracle, too."""
    world = world_of(TIMM_PLAIN)
    oracle = Oracle(world.tiny, world.module, world.columns, world.tensors)
    sender = run("sender", swap("blocks.0.attn.z", tokens="all"))
    receiver = run("receiver", swap("blocks.1.resid_pre", {"run": "sender"}))
    oracle.documents = {"sender": sender}
    clean, _ = oracle.clean("base")
    assert float((oracle.run(receiver)[0] - clean).abs().max()) > 1e-2 * world.scale
