"""Arguments of another kind are refused by name."""

from __future__ import annotations

import pytest

import vit_mechinterp as vmi
from tests.engine.world import world_of
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import Run
from vit_mechinterp.engine.prepared import run_together
from vit_mechinterp.errors import SpecError


def test_arguments_of_another_kind() -> None:
    world = world_of(TIMM_PLAIN)
    runs, store = [Run(name="clean")], vmi.ActivationStore()
    with pytest.raises(SpecError, match="out is the path of a folder or None, not int"):
        vmi.execute(world.vit, runs, world.columns, out=3)  # type: ignore[arg-type]
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
