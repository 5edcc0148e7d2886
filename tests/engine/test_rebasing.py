"""Rows whose base is replaced are their source's, or start blank; where something is left of a base, it is run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.test_reach import LAST, Document, push, rows, run, swap
from tests.engine.world import World, world_of
from tests.tiny_models import HF_CLIP, HF_DINOV2, HF_VIT, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, Tiny
from vit_mechinterp import Run
from vit_mechinterp.model.structure import follows_from
from vit_mechinterp.spec import Site


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


@pytest.mark.parametrize("later", ["blocks.1.attn.z", "blocks.1.resid_post"])
@pytest.mark.parametrize("captured", ["blocks.0.mlp_out", "blocks.0.resid_post", "blocks.1.ln1", LAST + ".ln1"])
@pytest.mark.parametrize("repeated", [[3], [0, 1, 2, 3]], ids=["one", "all"])
def test_values_between_another_run_and_an_edit_where_the_other_changes_nothing(
    later: str, captured: str, repeated: list[int]
) -> None:
    """In examples that are their own source, what goes on from the other run is the clean image until the edit."""
    world = World(TIMM_PLAIN, 4)
    for i in repeated:
        world.columns["source"][i] = world.columns["base"][i]
    documents = [
        run("first", swap("blocks.0.mlp_out", [3])),
        run("then", swap("blocks.0.resid_post", source={"run": "first"}), {"op": "ablate", "site": later, "tokens": [2]},
            capture=(captured,)),
    ]  # fmt: skip
    for batch_size in (1, 20):
        world.check(documents, world.execute(documents, batch_size=batch_size), effect=None)
    assert float((world.oracle.run(documents[1])[0] - world.oracle.clean("base")[0]).abs().max()) > 1e-3


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
    assert rows(world, sender, further, effect=None) == alone  # what it adds, it adds behind the last block
    # What the sender does later is not in it.
    late = run("sender", swap("blocks.0.mlp_out", [2]), push(f"{LAST}.mlp_out", ["cls"]))
    assert rows(world, late, run("same", whole, base="source"), effect=None) == [alone[0], alone[1], alone[2] + 3]
    for document in (captured, further):
        changed = world.oracle.run(document)[0] - world.oracle.clean("source")[0]
        assert float(changed.abs().max()) > 1e-3


def test_what_is_left_out_of_a_run_that_goes_on_is_not_said_of_the_other() -> None:
    world = world_of(TIMM_PLAIN, 3)
    site = "blocks.1.resid_post"
    sender = run("sender", push("embed", "patches"), swap(site, [3]))
    back = run("back", swap(site, source={"run": "sender"}), swap(site, [3], "base"))
    rows(world, sender, back)
    documents = list(map(Run.model_validate, (sender, back)))
    notes = vmi.plan(world.vit, documents, world.columns, tensors=world.named([sender])).notes
    assert not any("change nothing that is read" in note for note in notes)
    assert f"back is run 'sender' from {site} on" in str(notes)


def test_a_base_that_another_run_reads_stays() -> None:
    world = world_of(TIMM_PLAIN, 3)
    replaced = run("replaced", push("blocks.0.mlp_out", [2]), swap("blocks.1.resid_post"))
    reader = run("reader", swap("blocks.1.ln1", ["cls"], {"run": "replaced"}, source_tokens=[2]), base="source")
    assert sum(rows(world, replaced, reader)) > sum(rows(world, replaced))
    hidden = run("hidden", swap(f"{LAST}.attn.z", [2]), swap(f"{LAST}.resid_post", ["cls"]))
    reader = run("reader", swap(f"{LAST}.mlp_out", ["cls"], {"run": "hidden"}), base="source")
    rows(world, hidden, reader)


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


def test_a_stream_that_is_resampled_is_another_images_own() -> None:
    """The clean forward of the image that it was drawn from answers the row, also where that is the example's own."""
    world = world_of(TIMM_PLAIN, 5)
    resampled = {"op": "ablate", "site": "blocks.0.resid_post", "method": "resample", "seed": chosen_seed(5)}
    alone = Run.model_validate(run("a", resampled))
    plan = vmi.plan(world.vit, [Run(name="clean"), alone], world.columns)
    assert plan.clean_runs == ("clean", "a")
    assert plan.block_evaluations == vmi.plan(world.vit, [Run(name="clean")], world.columns).block_evaluations
    assert "another example's image 'base' from blocks.0.resid_post on" in str(plan)
    rows(world, run("a", resampled), effect=None)
    for store in (None, vmi.ActivationStore()):
        world.check([run("a", resampled)], world.execute([run("a", resampled)], store=store), effect=None)
    rows(world, run("a", resampled, push("blocks.1.mlp_out", [1]), capture=("blocks.0.resid_post", "blocks.2.ln1")), effect=None)


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
                patch.setattr(importlib.import_module("vit_mechinterp.engine.work"), "chunk_of", dying)
                with pytest.raises(KeyboardInterrupt):
                    world.execute(documents, **options)
            else:
                world.check(documents, world.execute(documents, **options))
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("site", ["pooled", "logits", "blocks.2.resid_post"])
def test_a_run_that_goes_on_from_runs_that_go_on_shows_its_own_before(site: str) -> None:
    """What a run captures before it becomes another's is its base's, however early that one was another's."""
    world = world_of(TIMM_PLAIN, 3)

    def of(other: str, at: str) -> dict[str, Any]:
        return {"op": "interchange", "site": at, "source": {"run": other}}

    first = {
        "name": "first",
        "interventions": [swap("blocks.0.attn.z", [5]), {"op": "ablate", "site": "blocks.2.mlp.pre"}],
        "output": False,
    }
    documents = [
        {"name": "last", "interventions": [of("first", "blocks.2.resid_post")]},
        first,
        {"name": "second", "interventions": [of("first", "blocks.1.resid_post")]},
        {"name": "third", "interventions": [of("second", site)], "capture": ["blocks.2.attn.v"]},
    ]
    results = world.execute(documents)
    world.check(documents, results)
    clean = world.oracle.clean("base")[1]["blocks.2.attn.v"]
    assert torch.allclose(results.captures["third"]["blocks.2.attn.v"], clean, atol=1e-5)


def test_a_run_that_goes_on_from_one_that_is_an_image_shows_its_own_before() -> None:
    """Though it becomes that image's by an edit that stands earlier, among those of the run that it goes on from."""
    world = world_of(TIMM_PLAIN, 3)
    captured = "blocks.1.resid_pre"
    documents = [
        {"name": "image", "base": "source", "capture": ["embed"], "output": False},
        run("is", push("embed", "all"), swap(captured, source={"run": "image"}), capture=("blocks.0.attn.k",)),
        {**run("on", swap("blocks.1.resid_post", source={"run": "is"}), capture=(captured, LAST + ".ln1")), "output": False},
    ]
    results = world.execute(documents)
    world.check(documents, results)
    clean = world.oracle.clean("base")[1][captured]
    assert torch.allclose(results.captures["on"][captured], clean, atol=1e-5)
    assert not torch.allclose(world.oracle.clean("source")[1][captured], clean, atol=1e-1)


def test_a_run_that_goes_on_from_a_blank_one_that_becomes_an_image_starts_from_that_image() -> None:
    world = World(TIMM_POOLED, 5)
    zeros = {"op": "ablate", "site": "embed", "method": "mean"}
    resampled = {"op": "ablate", "site": "blocks.0.resid_post", "method": "resample", "seed": 0}
    first = run("first", zeros, resampled, capture=("embed",))
    on = run("on", swap("blocks.2.resid_pre", source={"run": "first"}), {"op": "ablate", "site": "blocks.2.attn_out"})
    world.check([first, on], world.execute([first, on]))


def test_the_output_of_a_run_that_becomes_an_image_is_that_images() -> None:
    world = World(TIMM_POOLED, 5)
    resampled = {"op": "ablate", "site": "blocks.2.resid_post", "method": "resample", "seed": 0}
    documents = [
        {**run("seen", swap("logits", source={"run": "image"}), capture=("logits",)), "output": False},
        run("image", swap("embed"), resampled),
        run("reading", swap("blocks.2.resid_pre", source={"run": "image"})),
    ]
    world.check(documents, world.execute(documents))


@pytest.mark.parametrize("site", ["blocks.0.attn.z", "blocks.0.attn.result"])
@pytest.mark.parametrize("heads", [[0], [0, 1]])
def test_heads_that_are_replaced_beside_a_run_that_is_read(site: str, heads: list[int]) -> None:
    """Reducing such runs comes to an end, though what is read of the one is spelled by heads in between."""
    world = world_of(TIMM_PLAIN, 3)
    documents = [
        {
            "name": "reading",
            "interventions": [
                {"op": "ablate", "site": "blocks.0.attn.v", "heads": heads},
                {"op": "interchange", "site": site, "tokens": [2, 3], "source": {"run": "read"}},
            ],
        },
        {"name": "read", "interventions": [{"op": "ablate", "site": "blocks.0.attn.q", "tokens": [2]}]},
    ]
    world.check(documents, world.execute(documents))
