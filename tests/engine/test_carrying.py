"""Where attention and MLP are held, what is changed of the stream is added behind them, and no block runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vit_mechinterp as vmi
from tests.engine.world import Counted, World, world_of
from tests.tiny_models import HF_DINOV2, HF_VIT, N_LAYERS, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, Tiny
from vit_mechinterp import Run
from vit_mechinterp.circuits.nodes import LOGITS, Node, senders_of
from vit_mechinterp.circuits.path_patching import path_runs

Document = dict[str, Any]
MODELS = (TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, HF_VIT, HF_DINOV2)
ADDITIVE = ("embed", "resid_pre", "attn.z", "attn.result", "attn_out", "resid_mid", "mlp_out", "resid_post")


def held(layer: int, attention: str = "attn_out", mlp: str = "mlp_out", **fields: Any) -> list[Document]:
    sites = (f"blocks.{layer}.{name}" for name in (attention, mlp) if name)
    return [{"op": "interchange", "site": site, "source": "base", **fields} for site in sites]


def checked(world: World, documents: list[Document]) -> tuple[int, vmi.Plan]:
    """(row, block) pairs that run, as the plan says, after a check of the results."""
    runs = [Run.model_validate(own) for own in documents]
    plan = vmi.plan(world.vit, runs, world.columns, world.named(documents))
    with Counted(world.module) as counted:
        results = world.execute(documents)
    world.check(documents, results, effect=None)
    assert counted.total == plan.block_evaluations
    return counted.total, plan


@pytest.mark.parametrize("tiny", MODELS)
def test_path_patching_costs_its_clean_forwards(tiny: Tiny) -> None:
    """Every head, MLP and the embedding, into the logits alone: two forwards of each pair, and no block more."""
    world = World(tiny, 3)
    runs = [run for sender in senders_of(world.vit, None, embed=True)[0] for run in path_runs(world.vit, sender, [Node(LOGITS)])]
    documents = [run.model_dump(mode="json", exclude_defaults=True) for run in runs]
    total, plan = checked(world, documents)
    assert total == 2 * 3 * N_LAYERS < plan.naive_block_evaluations / 10
    clean = world.oracle.clean("base")[0]
    changes = [float((world.oracle.run(own)[0] - clean).abs().max()) for own in documents]
    assert min(changes[1:]) > 1e-4 * world.scale  # the embedding of CLS is the same in every image
    assert "interventions are made later, where that is the same" in str(plan)


def test_blocks_that_are_not_held_run() -> None:
    world = world_of(TIMM_PLAIN, 3)
    sender = {"op": "interchange", "site": "blocks.0.mlp_out", "source": "source", "tokens": ["cls", 2]}
    forwards = 9 + 3  # of the base, and of the source as far as the sender
    clean: Document = {"name": "clean"}
    assert checked(world, [clean, {"name": "all", "interventions": [sender, *held(1), *held(2)]}])[0] == forwards
    for less in (held(1), held(2), [*held(1), *held(2, mlp="")], [*held(1, tokens=[3]), *held(2)]):
        assert checked(world, [clean, {"name": "less", "interventions": [sender, *less]}])[0] > forwards
    seen = {"name": "seen", "interventions": [sender, *held(1), *held(2)], "capture": ["blocks.2.ln2"]}
    assert checked(world, [clean, seen])[0] == forwards + 3
    results = world.execute([seen])
    wanted = world.oracle.run(seen)[1]["blocks.2.ln2"]
    assert torch.allclose(results.captures["seen"]["blocks.2.ln2"], wanted, atol=1e-5)
    assert float((wanted - world.oracle.clean("base")[1]["blocks.2.ln2"]).abs().max()) > 1e-3


@pytest.mark.parametrize("capture", [[], ["embed"], ["blocks.0.resid_pre"], ["blocks.1.resid_post"]])
@pytest.mark.parametrize("site", ["embed", "blocks.0.resid_post"])
def test_several_edits_of_one_value_and_what_is_read_of_it(site: str, capture: list[str]) -> None:
    """What is changed by one of them alone would not be all that is carried on, nor what is seen where it is made."""
    world = world_of(TIMM_PLAIN, 3)
    one, other = ({"op": "interchange", "site": site, "source": "source", "tokens": [token]} for token in (2, 3))
    push = {"op": "add_direction", "site": site, "vector": f"direction.{world.module_width}"}
    blocks = [edit for layer in (0, 1) if site == "embed" or layer for edit in held(layer)]
    for edits in ([one], [one, other], [one, push]):
        checked(world, [{"name": "clean"}, {"name": "several", "interventions": [*edits, *blocks], "capture": capture}])


def test_the_output_of_the_last_block_that_is_held_can_be_read_and_edited() -> None:
    world = world_of(TIMM_PLAIN, 3)
    sender = {"op": "interchange", "site": "blocks.0.resid_post", "source": "source", "tokens": ["cls", 2]}
    more = {"op": "ablate", "site": "blocks.1.resid_post", "tokens": [3]}
    document = {"name": "seen", "interventions": [sender, *held(1), more], "capture": ["blocks.1.resid_post"]}
    assert checked(world, [{"name": "clean"}, document])[0] == 9 + 3 + 3


def test_what_is_put_back_at_once_is_not_carried_on() -> None:
    world = world_of(TIMM_PLAIN, 3)
    for site in ("attn.z", "attn_out", "mlp_out"):
        sender = {"op": "interchange", "site": f"blocks.1.{site}", "source": "source"}
        edits = [sender, *held(1), *held(2)]
        documents = [{"name": "a", "interventions": edits}]
        world.check(documents, world.execute(documents), effect=None)
        changed = world.oracle.run(documents[0])[0] - world.oracle.clean("base")[0]
        assert float(changed.abs().max()) < 1e-5 * world.scale


def test_in_half_precision_held_blocks_run() -> None:
    """What blocks put out is no exact sum there."""
    sender = {"op": "interchange", "site": "blocks.0.attn.z", "source": "source", "heads": [1]}
    document = {"name": "a", "interventions": [sender, *held(0, attention=""), *held(1), *held(2)]}
    half, double = World(TIMM_PLAIN, 3, torch.bfloat16), World(TIMM_PLAIN, 3, torch.float64)
    runs = [Run.model_validate(document)]
    plans = [vmi.plan(world.vit, runs, world.columns) for world in (half, double)]
    assert [plan.block_evaluations for plan in plans] == [9 + 3 + 9, 9 + 3]
    wanted = World(TIMM_PLAIN, 3).oracle.run(document)[0]
    assert float((half.execute([document])["a"] - wanted).abs().max()) < 0.03 * half.scale
    assert float((double.execute([document])["a"] - wanted).abs().max()) < 1e-5 * double.scale


@st.composite
def held_experiments(draw: Any) -> tuple[World, list[Document]]:
    """Runs that change something at a place that adds to the stream, and hold some of the blocks around it."""
    tiny = draw(st.sampled_from(MODELS))
    world = world_of(tiny, 3)
    documents = []
    for n in range(draw(st.integers(1, 4))):
        layer, place = draw(st.integers(0, N_LAYERS - 1)), draw(st.sampled_from(ADDITIVE))
        site = place if place == "embed" else f"blocks.{layer}.{place}"
        width = world.shape(site)[-1]
        tokens = draw(st.sampled_from(["all", "patches", [1, 4], {"column": "here"}]))
        op = draw(
            st.sampled_from(
                [
                    {"op": "interchange", "source": "source"},
                    {"op": "ablate", "method": "zero"},
                    {"op": "ablate", "method": "mean"},
                    {"op": "add_direction", "vector": f"direction.{width}"},
                    {"op": "inject_subspace", "basis": f"basis.{width}", "source": "source"},
                ]
            )
        )
        sender: Document = {**op, "site": site, "tokens": tokens}
        if place in ("attn.z", "attn.result") and draw(st.booleans()):
            sender["heads"] = draw(st.lists(st.integers(0, 1), min_size=1, unique=True))
        edits = [sender]
        for other in range(N_LAYERS):
            if draw(st.integers(0, 5)):
                attention = draw(st.sampled_from(["attn.z", "attn_out"])) if draw(st.integers(0, 5)) else ""
                edits += held(other, attention, draw(st.sampled_from(["mlp.post", "mlp_out", "mlp_out", "mlp_out"])))
        if not draw(st.integers(0, 3)):
            edits.append({**sender, "site": f"blocks.{N_LAYERS - 1}.resid_post", "op": "interchange", "source": "source"})
            edits[-1] = {k: v for k, v in edits[-1].items() if k in ("op", "site", "source", "tokens")}
        capture = draw(st.sampled_from([[], [], ["blocks.2.resid_post"], ["blocks.1.attn.q"], ["blocks.2.mlp_out"]]))
        documents.append({"name": f"r{n}", "interventions": edits, "capture": capture})
    return world, documents


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(held_experiments())
def test_any_held_experiment(experiment: tuple[World, list[Document]]) -> None:
    world, documents = experiment
    checked(world, documents)
    results = world.execute(documents)
    for document in documents:
        values = world.oracle.run(document)[1]
        for site in document["capture"]:
            found = results.captures[document["name"]][site]
            assert float((found - values[site]).abs().max()) < 1e-5 * max(1.0, float(values[site].abs().max()))
