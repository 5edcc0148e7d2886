"""Arguments of another kind are refused by name."""

from __future__ import annotations

import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.world import world_of
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import Run
from vit_mechinterp.engine import prepare
from vit_mechinterp.engine.training.prepared import Batch, run_together
from vit_mechinterp.errors import SpecError


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
