"""Whatever small set of runs is drawn: the plan counts what is executed, and sharing changes no result."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vit_mechinterp as vmi
from tests.engine.world import Counted, world_of
from tests.tiny_models import HF_DINOV2, TIMM_PLAIN
from vit_mechinterp import Run

WORLDS = st.sampled_from([TIMM_PLAIN, HF_DINOV2]).map(lambda tiny: world_of(tiny, 5))
TOKENS = st.sampled_from(["all", ["cls", 3], [7], "patches", {"column": "here"}, {"box": "box"}])


@st.composite
def edits(draw: Any, world: Any, readable: list[str]) -> dict[str, Any]:
    site = draw(st.sampled_from(world.sites))
    op = draw(st.sampled_from(["interchange", "interchange", "add", "subspace", "zero", "mean", "resample"]))
    edit: dict[str, Any] = {"site": site}
    if site not in ("pooled", "logits"):
        edit["tokens"] = draw(TOKENS)
    d = world.shape(site)[-1]
    source = st.sampled_from(["base", "source", *({"run": name} for name in readable)])
    match op:
        case "interchange":
            edit |= {"op": "interchange", "source": draw(source)}
        case "subspace":
            edit |= {"op": "inject_subspace", "source": draw(source), "basis": f"basis.{d}"}
        case "add":
            edit |= {"op": "add_direction", "vector": f"direction.{d}"}
        case "zero":
            edit |= {"op": "ablate"}
        case "mean":
            edit |= {"op": "ablate", "method": "mean", "pool_tokens": draw(st.booleans())}
        case "resample":
            edit |= {"op": "ablate", "method": "resample", "seed": draw(st.integers(0, 3))}
    return edit


@st.composite
def experiments(draw: Any) -> tuple[Any, list[dict[str, Any]]]:
    world = draw(WORLDS)
    runs: list[dict[str, Any]] = []
    for n in range(draw(st.integers(1, 4))):
        made = st.lists(edits(world, [run["name"] for run in runs]), max_size=3)
        sites = draw(st.lists(st.sampled_from(world.sites), max_size=3, unique=True))
        base = draw(st.sampled_from(["base", "base", "source"]))
        runs.append({"name": f"run{n}", "base": base, "interventions": draw(made), "capture": sites})
    return world, draw(st.permutations(runs))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(experiments(), st.sampled_from([1, 2, 3, 4, 7, 20]))
def test_any_experiment(experiment: tuple[Any, list[dict[str, Any]]], batch_size: int) -> None:
    world, documents = experiment
    runs = [Run.model_validate(document) for document in documents]
    plan = vmi.plan(world.vit, runs, world.columns, batch_size)
    with Counted(world.module) as counted:
        results = world.execute(documents, batch_size=batch_size)
    assert counted.total == plan.block_evaluations
    world.check(documents, results, tolerance=2e-5, effect=None)
