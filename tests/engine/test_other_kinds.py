"""Arguments of another kind are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.world import world_of
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import Run
from vit_mechinterp.engine import prepare
from vit_mechinterp.engine.training.batch import Batch
from vit_mechinterp.engine.training.prepared import run_together
from vit_mechinterp.errors import ExecutionError, SpecError


def test_arguments_of_another_kind() -> None:
    world = world_of(TIMM_PLAIN)
    runs, store = [Run(name="clean")], vmi.ActivationStore()
    with pytest.raises(SpecError, match="out is the path of a folder or None, not int"):
        vmi.execute(world.vit, runs, world.columns, out=3)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"out is an empty path; name a folder, '\.' for the current one"):
        vmi.execute(world.vit, runs, world.columns, out="")
    with pytest.raises(SpecError, match="folder is the path of a folder or None, not int"):
        vmi.ActivationStore(3)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="store is an ActivationStore or None, not int"):
        vmi.execute(world.vit, runs, world.columns, store=3)  # type: ignore[arg-type]
    for sites in (7, None):
        with pytest.raises(SpecError, match=r"sites is a site name, a glob such as .* or several, not (int|NoneType)"):
            store.capture(world.vit, world.columns, sites)  # type: ignore[arg-type]
    for batches in (3, [3]):
        with pytest.raises(SpecError, match=r"a list of Batch\(prepared, examples\), also for one: run_together\(\[batch\]"):
            run_together(batches, {})  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"A batch is one of a preparation .*, not of NoneType"):
        Batch(None, [0])  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="folder is the path of a folder or None, not int"):
        vmi.execute(world.vit, runs, world.columns, progress=False).save(3)  # type: ignore[arg-type]
    shape = pytest.raises(SpecError, match=r"examples are one list of numbers, and these have shape \(2, 2\)")
    with prepare(world.vit, runs, world.columns, {}, progress=False) as prepared:
        with shape:
            prepared(torch.zeros(2, 2, dtype=torch.long), {})  # type: ignore[arg-type]
        for size in (0, -1, "a", True):
            with pytest.raises(SpecError, match="cut into parts of a positive number of rows, not of"):
                list(Batch(prepared, [0]).cut(size))  # type: ignore[arg-type]


PUSH = Run(name="push", interventions=[vmi.AddDirection(site="blocks.1.resid_post", vector="v")])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((3,), "examples=3 is no list of numbers of examples, 0 to 2"),
        (("0",), "examples='0' is no list of numbers of examples, 0 to 2"),
        (({0, 1},), r"examples=\{0, 1\} is no list of numbers of examples, 0 to 2"),
        ((torch.tensor(0),), r"examples=tensor\(0\) is no list of numbers of examples, 0 to 2"),
        ((torch.zeros(1, device="meta"),), r"examples stand on the meta device, .* Make them on the CPU\."),
        ((np.zeros((1, 2), dtype=int),), r"examples are one list of numbers, and these have shape \(1, 2\)"),
        (([0], "push"), r"runs='push' is one name; a batch names its runs in a list: \['push'\]"),
        (([0], 5), "runs=5 is no list of names of runs; leave runs out for all of them"),
        (([0], [["push"]]), r"runs=\[\['push'\]\] is no list of names of runs"),
    ],
)
def test_batches_of_another_kind(arguments: Any, text: str) -> None:
    world = world_of(TIMM_PLAIN)
    with prepare(world.vit, PUSH, world.columns, {"v": torch.ones(world.module_width)}, progress=False) as prepared:
        with pytest.raises(SpecError, match=text):
            Batch(prepared, *arguments)
        assert Batch(prepared, np.array([0, 2]), ["push"]).rows == 2  # type: ignore[arg-type]


def test_batches_whose_numbers_are_none() -> None:
    world = world_of(TIMM_PLAIN)
    with prepare(world.vit, PUSH, world.columns, {"v": torch.ones(world.module_width)}, progress=False) as prepared:
        for examples in ([0.5], torch.tensor([0.5])):
            with pytest.raises(SpecError, match=r"examples=.*0\.5.* are no numbers of examples, 0 to 2"):
                Batch(prepared, examples).checked()  # type: ignore[arg-type]
        for order in (3, [0], ["x"]):
            with pytest.raises(SpecError, match="is no order of the sources' tokens: they have none, so leave it out"):
                Batch(prepared, [0], source_order=order).checked()  # type: ignore[arg-type]


def test_what_has_no_numbers() -> None:
    world, empty = world_of(TIMM_PLAIN), {"v": torch.ones(world_of(TIMM_PLAIN).module_width, device="meta")}
    for act in (vmi.execute, vmi.plan, prepare):
        with pytest.raises(SpecError, match=r"vector names the tensor 'v', .* meta device, .* Give one on the CPU"):
            act(world.vit, PUSH, world.columns, empty).__enter__()  # type: ignore[operator, union-attr]
    model = vmi.wrap(TIMM_PLAIN.module().to("meta"))
    tensors = {"v": torch.ones(world.module_width)}
    for act in (vmi.execute, vmi.plan, prepare):
        with pytest.raises(ExecutionError, match="VisionTransformer stands on the meta device and has no weights: make"):
            act(model, PUSH, world.columns, tensors).__enter__()  # type: ignore[operator, union-attr]
    with vmi.ActivationStore() as store:
        with pytest.raises(ExecutionError, match="stands on the meta device and has no weights"):
            store.capture(model, world.columns, "embed")
        with pytest.raises(ExecutionError, match="stands on the meta device and has no weights"):
            vmi.plan(model, Run(name="clean"), world.columns, store=store)
    assert vmi.plan(model, PUSH, world.columns).block_evaluations == 2 * world.n + world.n


def test_bars_are_shown_or_not() -> None:
    world, runs = world_of(TIMM_PLAIN), [Run(name="clean")]
    with pytest.raises(SpecError, match="progress is True or False, not 'no'"):
        vmi.execute(world.vit, runs, world.columns, progress="no")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="progress is True or False, not None"), prepare(world.vit, runs, world.columns, {}, progress=None):  # type: ignore[arg-type]
        pass
    vmi.execute(world.vit, runs, world.columns, progress=np.False_)  # type: ignore[arg-type]


def test_one_intervention_stands_for_a_list_of_it() -> None:
    swap = vmi.Interchange(site="blocks.1.mlp_out", source="source")
    assert Run(name="a", interventions=swap) == Run(name="a", interventions=[swap])  # type: ignore[arg-type]
    assert Run.model_validate({"name": "a", "interventions": swap.model_dump()}) == Run(name="a", interventions=(swap,))


def test_names_of_sweeps_that_are_no_format() -> None:
    swap = vmi.Interchange(site="blocks.1.mlp_out", source="source")
    for name in ("{layer!z}", "{layer:zz}", "{layer"):
        with pytest.raises(SpecError, match=r"is no format string \(.*\). Write an axis as {axis}"):
            vmi.Sweep(name=name, interventions=[swap], over={"layer": [0, 1]})
    with pytest.raises(SpecError, match="'x' is not an integer"):
        vmi.Sweep(interventions=[swap], over={"layer": "all"}).runs("x")  # type: ignore[arg-type]
