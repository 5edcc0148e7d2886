"""What puts in what is there already costs nothing: of an image, at the embedding, or of another run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vit_mechinterp as vmi
from tests.engine.world import Counted, World, world_of
from tests.tiny_models import TIMM_PLAIN
from tests.zoo.test_timm import tiny
from vit_mechinterp import Run

Document = dict[str, Any]
NOISE: Document = {"op": "add_direction", "site": "embed", "tokens": [3, 4], "vector": "direction.24"}
CORRUPT: Document = {"name": "corrupt", "interventions": [NOISE]}
N_PATCHES = 16


def swap(site: str, tokens: Any, source: Any = "base", **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "tokens": tokens, "source": source, **fields}


def from_corrupt(site: str, tokens: Any, **fields: Any) -> Document:
    return swap(site, tokens, {"run": "corrupt"}, **fields)


def run(name: Any, *edits: Document, **fields: Any) -> Document:
    return {"name": str(name), "interventions": list(edits), **fields}


def evaluations(world: World, *documents: Document) -> int:
    """(row, block) pairs that run, as the plan says, after a check of the results."""
    plan = vmi.plan(world.vit, [Run.model_validate(own) for own in documents], world.columns, world.named(documents))
    with Counted(world.module) as counted:
        results = world.execute(documents)
    world.check(documents, results, effect=None)
    assert counted.total == plan.block_evaluations
    return counted.total


@pytest.mark.parametrize("site", ["embed", "blocks.0.resid_pre", "blocks.0.ln1"])
def test_tokens_that_noise_has_not_reached_are_restored_already(site: str) -> None:
    """The first row of a causal tracing: two of sixteen patches differ from the corrupted run."""
    world = world_of(TIMM_PLAIN, 3)
    alone = evaluations(world, CORRUPT)
    two = evaluations(world, CORRUPT, *(run(t, NOISE, swap(site, [t])) for t in (3, 4)))
    all_of_them = evaluations(world, CORRUPT, *(run(t, NOISE, swap(site, [t])) for t in range(N_PATCHES)))
    assert alone < two == all_of_them


def test_what_a_run_holds_of_another_is_not_put_in_again() -> None:
    """MLPs that are held to what they are in the corrupted run are that, up to what is restored."""
    world = world_of(TIMM_PLAIN, 3)
    restore = swap("blocks.1.resid_post", [5])
    held = [from_corrupt(f"blocks.{layer}.mlp_out", [5]) for layer in range(3)]
    severed = evaluations(world, CORRUPT, run("severed", NOISE, restore, *held))
    assert severed == evaluations(world, CORRUPT, run("severed", NOISE, restore, held[2]))
    assert severed > evaluations(world, CORRUPT, run("held", NOISE, *held)) == evaluations(world, CORRUPT)


def test_what_another_run_has_not_changed_is_the_images_own() -> None:
    world = world_of(TIMM_PLAIN, 3)
    noising = [run(t, from_corrupt("blocks.0.resid_pre", [t])) for t in range(N_PATCHES)]
    clean = run("clean")
    assert evaluations(world, clean, CORRUPT, *noising) == evaluations(world, clean, CORRUPT, *noising[3:5])
    elsewhere = run("elsewhere", from_corrupt("blocks.0.resid_pre", [7], source_tokens=[9]))
    assert evaluations(world, elsewhere, CORRUPT) == evaluations(world, run("own", swap("blocks.0.resid_pre", [7], source_tokens=[9])), CORRUPT)


def test_what_another_run_does_later_at_the_site_is_put_in() -> None:
    """A run that reads it, and then does the same again, does it twice."""
    world = world_of(TIMM_PLAIN, 3)
    twice = run("twice", from_corrupt("embed", [3, 4]), NOISE)
    more = run("more", NOISE, from_corrupt("blocks.0.resid_pre", [3]), {**NOISE, "tokens": [4]})
    evaluations(world, CORRUPT, twice, more)
    outputs = [world.oracle.run(own)[0] for own in (CORRUPT, twice, more)]
    assert all(float((one - outputs[0]).abs().max()) > 1e-3 for one in outputs[1:])


def test_a_token_that_is_an_images_own_in_both_its_parts_comes_out_as_the_images() -> None:
    world = world_of(TIMM_PLAIN, 3)
    stream, attention = swap("blocks.1.resid_pre", [2, 5], "source"), swap("blocks.1.attn_out", [2], "source")
    both = run("both", stream, attention)
    assert evaluations(world, run("one", stream), both) == evaluations(world, run("one", stream), run("two", stream, swap("blocks.1.resid_post", [2], "source")))


def test_tokens_that_nobody_reads_in_some_examples_are_not_read_there() -> None:
    """Not even of a run whose rows are clean in those examples."""
    world = World(TIMM_PLAIN, 4)
    world.columns["ragged"] = [[13, 1], [6], [1, 11], [6, 1, 4]]
    world.columns["source"][1] = world.columns["base"][1]
    sender = run("corrupt", {"op": "interchange", "source": "source", "site": "blocks.1.ln1"})
    site = "blocks.2.attn.result"
    reader = run("reader", from_corrupt("blocks.2.attn.z", [13, 7]), capture=[{"site": site, "tokens": {"column": "ragged"}}])
    results = world.execute([sender, reader], batch_size=2)
    world.oracle.documents = {own["name"]: own for own in (sender, reader)}
    output, values = world.oracle.run(reader)
    assert torch.allclose(results["reader"], output, atol=1e-5 * world.scale)
    for example, patches in enumerate(world.columns["ragged"]):
        wanted = values[site][example, [1 + patch for patch in patches]]
        assert torch.allclose(results.captures["reader"][site][example], wanted, atol=1e-5)


def test_what_an_intervention_multiplies_is_not_taken_for_attention() -> None:
    """Where the attention call is the block's own, a subspace for each token is a product of as many axes."""
    vit = tiny("vit_base_patch16_xp_224")
    draw = torch.Generator().manual_seed(0)
    images = {name: torch.randn(2, *vit.layout.tokens.input_shape, generator=draw) for name in ("base", "source")}
    bases = torch.linalg.qr(torch.randn(4, vit.layout.d_model, 3, generator=draw)).Q
    site, tokens = "blocks.1.mlp_out", [0, 6, 5, 4]
    given = vit.run(images["source"], capture=[site])[1][site]

    def injected(h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        for token, basis in zip(tokens, bases, strict=True):
            h[:, token] += (given[:, token] - h[:, token]) @ basis @ basis.T
        return h

    def silent(q: torch.Tensor) -> torch.Tensor:
        return torch.cat([q[:, :, :1], torch.zeros_like(q[:, :, 1:2]), q[:, :, 2:]], dim=2)

    with torch.no_grad(), vit.hooks({"blocks.1.attn.q": silent, site: injected}):
        wanted = vit(images["base"])
    edits = [
        vmi.Ablate(site="blocks.1.attn.q", heads=[1]),
        vmi.InjectSubspace(site=site, basis=vmi.TensorRef("b"), source="source", tokens=["cls", 5, 4, 3]),
    ]
    found = vmi.execute(vit, [Run(name="r", interventions=edits)], images, {"b": bases}, progress=False)["r"]
    with torch.no_grad():
        clean = vit(images["base"])
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))
    assert float((wanted - clean).abs().max()) > 1e-3


def test_edits_that_are_made_one_are_idle_where_both_are() -> None:
    """One of them is written over in the second example, and not in the first."""
    world = World(TIMM_PLAIN, 2)
    world.columns["here"] = torch.tensor([[0, 2, 1], [1, 0, 3]])
    edits = [
        swap("blocks.2.mlp.pre", "all", "source"),
        swap("blocks.2.mlp.post", [3], "source"),
        {"op": "ablate", "site": "blocks.2.mlp_out", "tokens": {"column": "here"}},
    ]
    edited = run("edited", *edits, capture=["blocks.2.mlp_out"])
    evaluations(world, edited)
    found = world.execute([edited]).captures["edited"]["blocks.2.mlp_out"]
    assert torch.allclose(found, world.oracle.run(edited)[1]["blocks.2.mlp_out"], atol=1e-5)
    assert (found[1, [1, 2, 4]] == 0).all()
    assert float(found[1, 3].abs().min()) > 0


SITES = ("resid_pre", "ln1", "attn.q", "attn.v", "attn.z", "attn_out", "resid_mid", "ln2", "mlp.post", "mlp_out", "resid_post")


@st.composite
def runs_that_begin_alike(draw: Any) -> list[Document]:
    """A corrupted run, and runs that begin with some of its interventions and read it, their base and another image."""

    def edit(sources: list[Any]) -> Document:
        site = f"blocks.{draw(st.integers(0, 2))}.{draw(st.sampled_from(SITES))}"
        tokens = draw(st.sampled_from([[1], ["cls", 2], [2, 3], [3, 1], "all", {"column": "here"}]))
        kinds: list[Document] = [{"op": "interchange", "source": source} for source in sources]
        if "attn" not in site and "mlp.post" not in site:
            kinds.append({"op": "add_direction", "vector": "direction.24"})
        return {**draw(st.sampled_from(kinds)), "site": site, "tokens": tokens}

    begun = [edit(["source", "base"]) for _ in range(draw(st.integers(1, 2)))]
    begun += [NOISE] if draw(st.booleans()) else []
    documents = [run("corrupt", *begun)]
    for n in range(draw(st.integers(1, 3))):
        some = [own for own in begun if draw(st.integers(0, 3))]
        others = [edit([{"run": "corrupt"}, {"run": "corrupt"}, "base", "source"]) for _ in range(draw(st.integers(1, 3)))]
        documents.append(run(n, *draw(st.permutations([*some, *others]))))
    return documents


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(runs_that_begin_alike())
def test_any_runs_that_begin_alike(documents: list[Document]) -> None:
    evaluations(world_of(TIMM_PLAIN, 3), *documents)
