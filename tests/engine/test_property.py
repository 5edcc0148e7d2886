"""Whatever small set of runs is drawn: the plan counts what is executed, and sharing changes no result.

Ops, sites, tokens, heads, layers, run graphs, runs without output, repeated images and examples, rows per forward, chunks and
stores are drawn; what must come out is what the oracle makes of one run at a time. Blocks are counted with hooks on them, and held against a
count of distinct rows that is made from the documents alone.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import vit_mechinterp as vmi
from tests.engine.drawn import Document, N, experiments, worlds
from tests.engine.world import Counted, World
from tests.tiny_models import HF_DINOV2, N_LAYERS, TIMM_PLAIN
from vit_mechinterp import ActivationStore, Run

LONGEST = 10.0
"""Seconds that an experiment may take."""


def hold(experiment: tuple[World, list[Document]], batch_size: int, chunk: int | None, stored: bool) -> None:
    """Assert that an experiment gives the oracle's results, with as many blocks as its plan says, and no more than one run
    at a time takes."""
    world, documents = experiment
    runs = [Run.model_validate(document) for document in documents]
    options: dict[str, Any] = {"batch_size": batch_size}
    if chunk is not None:
        options["memory"] = world.memory(documents, chunk, batch_size, stored=stored)
    with ActivationStore() if stored else nullcontext() as store:
        options["store"] = store
        plan = vmi.plan(world.vit, runs, world.columns, tensors=world.named(documents), **options)
        assert plan.chunk == N if chunk is None else plan.chunk < N
        with Counted(world.module) as counted:
            results = world.execute(documents, **options)
    assert counted.total == plan.block_evaluations <= plan.naive_block_evaluations
    assert counted.launches == plan.launches
    assert plan.widest <= batch_size
    world.check(documents, results, effect=None)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """A failure of what takes longer, in time of the processor: how busy the machine is proves nothing."""

    def late(*_: object) -> None:
        pytest.fail(f"this takes longer than {seconds} s, if it ever ends")  # which is no Exception, so nobody goes on after it

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


DRAWN = given(experiments(), st.sampled_from([1, 2, 3, 4, 7, 20]), st.sampled_from([None, None, 1, 2, 3]), st.booleans())
QUIET = settings(
    phases=[Phase.generate],  # a failing experiment is small, and making it smaller takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(QUIET, max_examples=60)
@DRAWN
def test_any_experiment(
    experiment: tuple[World, list[Document]], batch_size: int, chunk: int | None, stored: bool
) -> None:
    with limited(LONGEST):
        hold(experiment, batch_size, chunk, stored)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_many_experiments(number: int) -> None:
    """What goes wrong once in thousands of experiments."""

    @seed(number)
    @settings(QUIET, max_examples=500)
    @DRAWN
    def drawn(
        experiment: tuple[World, list[Document]], batch_size: int, chunk: int | None, stored: bool
    ) -> None:
        with limited(LONGEST):
            hold(experiment, batch_size, chunk, stored)

    drawn()


@st.composite
def sweeps(draw: Any) -> tuple[World, list[Document]]:
    """Runs of one edit each, none of which reads another."""
    world = draw(worlds(TIMM_PLAIN, HF_DINOV2))
    sites = st.sampled_from([s for s in world.sites if s not in ("ln_final", "pooled", "logits")])
    runs = []
    for n in range(draw(st.integers(1, 8))):
        edit = {"op": "interchange", "site": draw(sites), "source": draw(st.sampled_from(["base", "source"]))}
        edit["tokens"] = draw(st.sampled_from([["cls"], ["cls", 3], {"column": "here"}, "all"]))
        runs.append({"name": f"{n}", "interventions": [edit]})
    return world, runs


def least(world: World, documents: list[Document]) -> int:
    """(row, block) pairs that cannot be done without: distinct rows behind the block where their edit is, and distinct
    images up to the last block that somebody reads. Nobody reads patches behind the last attention call of a model whose
    head reads CLS, and where all that is read of the residual stream is replaced, the row is the source's. A token of an
    image inside attention or MLP is that image's where it comes out."""
    out = dict.fromkeys(("attn.z", "attn.result"), "attn_out") | dict.fromkeys(("ln2", "mlp.post"), "mlp_out")
    out |= {"resid_mid": "resid_post"} | ({"mlp.pre": "mlp_out"} if "mlp.pre_linear" in world.tiny.missing else {})
    read = {0} if world.tiny is TIMM_PLAIN else set(range(world.shape("embed")[0]))
    rows: dict[Any, int] = {}
    depth: dict[bytes, int] = {}
    image = {c: [x.numpy().tobytes() for x in world.columns[c]] for c in ("base", "source")}

    def clean(which: bytes, site: str) -> None:
        layer = int(site.split(".")[1]) if site != "embed" else 0
        blocks = layer if site == "embed" or site.endswith("resid_pre") else layer + 1
        depth[which] = max(depth.get(which, 0), blocks)

    for document in documents:
        (edit,) = document["interventions"]
        site, column = edit["site"], edit["source"]
        name = site.split(".", 2)[-1]
        for i in range(5):
            base, source = image["base"][i], image[column][i]
            if base == source:
                depth[base] = N_LAYERS
                continue
            tokens = set(world.oracle.positions(edit["tokens"], i))
            layer = 0 if site == "embed" else int(site.split(".")[1])
            mixed_later = layer < N_LAYERS - 1 or name in ("embed", "resid_pre", "ln1", "attn.k", "attn.v")
            reaching = set(range(world.shape("embed")[0])) if mixed_later else read
            if not reaching & tokens:
                depth[base] = N_LAYERS
                continue
            if name in ("embed", "resid_pre", "resid_mid", "resid_post") and reaching <= tokens:
                depth[source] = N_LAYERS
                continue
            # What enters a block is what the one before puts out.
            name = out.get(name, name)
            joins_behind = name in ("resid_post", "mlp_out")
            site = f"blocks.{layer}.{name}" if "." in site else site
            place = f"blocks.{layer - 1}.resid_post" if name == "resid_pre" and layer else site
            rows[base, source, place, frozenset(reaching & tokens)] = N_LAYERS - layer - joins_behind
            clean(source, site)
            clean(base, site if joins_behind else "embed" if layer == 0 else f"blocks.{layer}.resid_pre")
    return sum(rows.values()) + sum(depth.values())


@settings(QUIET, max_examples=30)
@given(sweeps(), st.sampled_from([2, 5, 30]))
def test_no_pair_of_row_and_block_is_computed_in_vain(
    sweep: tuple[World, list[Document]], batch_size: int
) -> None:
    world, documents = sweep
    with Counted(world.module) as counted:
        results = world.execute(documents, batch_size=batch_size)
    assert counted.total == least(world, documents)
    world.check(documents, results, effect=None)
