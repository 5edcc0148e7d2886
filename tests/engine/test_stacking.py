"""Interventions of many runs at one site, carried out as one: every run as if it were alone."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.engine.world import World
from tests.tiny_models import HF_VIT, TIMM_PLAIN, Tiny
from vit_mechinterp.engine.binding import ops
from vit_mechinterp.engine.forwards import stacking, wave
from vit_mechinterp.spec import OPS, AddDirection, Intervention, TensorRef, register_op

HERE, THERE = {"column": "here"}, {"column": "there"}
BOXES = {"box": "box"}


@pytest.fixture(scope="module", params=[HF_VIT, TIMM_PLAIN], ids=lambda tiny: tiny.name)
def world(request: pytest.FixtureRequest) -> World:
    tiny: Tiny = request.param
    return World(tiny, n=4)


def run(name: str, *edits: dict[str, Any], base: str = "base") -> dict[str, Any]:
    return {"name": name, "base": base, "interventions": list(edits)}


def residual(world: World) -> list[dict[str, Any]]:
    """At one block output: all that is carried out together, and what stands alone between it."""
    d, site = world.module_width, "blocks.1.resid_post"

    def swap(**fields: Any) -> dict[str, Any]:
        return {"op": "interchange", "site": site, "source": "source", **fields}

    def push(alpha: float, vector: str = f"direction.{d}", **fields: Any) -> dict[str, Any]:
        return {"op": "add_direction", "site": site, "vector": vector, "alpha": alpha, "tokens": HERE, **fields}

    def write(**fields: Any) -> dict[str, Any]:
        return {
            "op": "inject_subspace", "site": site, "basis": f"basis.{d}", "source": "source", "tokens": HERE,
            "source_tokens": THERE, **fields,
        }  # fmt: skip

    def point(**fields: Any) -> dict[str, Any]:
        return {"op": "inject_subspace", "site": site, "basis": f"basis.{d}", "vectors": "point.3", "tokens": HERE, **fields}

    def drop(method: str, **fields: Any) -> dict[str, Any]:
        return {"op": "ablate", "site": site, "method": method, "tokens": HERE, **fields}

    return [
        run("swap", swap(tokens=HERE, source_tokens=THERE)),
        run("swap one", swap(tokens=["cls"])),
        run("swap boxes", swap(tokens=BOXES)),
        run("swap all", swap()),
        run("swap from base", swap(tokens=HERE, source="base"), base="source"),
        run("swap from a run", swap(tokens=HERE, source={"run": "swap"})),
        run("push", push(2.0)),
        run("pull", push(-1.5)),
        run("push rows", push(1.0, f"rows.3.{d}")),
        run("push rows back", push(-3.0, f"flat.3.{d}")),
        run("push by kind", push(1.0, f"kinds.{d}", choose={"column": "kind"})),
        run("push rows by kind", push(2.5, f"kinds.3.{d}", choose={"column": "kind"})),
        run("push twice", push(2.0), push(1.25, f"rows.3.{d}")),
        run("write", write()),
        run("write in part", write(gate="gate")),
        run("push, then swap", push(2.0, tokens=["cls"]), swap(tokens=HERE)),
        run("swap, then push", swap(tokens=HERE), push(3.0)),
        run("push what is swapped then", push(2.0), swap(tokens=HERE, source_tokens=THERE)),
        run("write a point", point()),
        run("write a point in part", point(gate="gate")),
        run("drop", drop("zero")),
        run("drop two", drop("zero", tokens=[0, 3])),
        run("drop to the mean", drop("mean")),
        run("drop to the pooled mean", drop("mean", pool_tokens=True)),
        run("drop to what is given", drop("mean", mean=f"mean.{site}")),
        run("drop to another", drop("resample", seed=3)),
    ]


def heads(world: World) -> list[dict[str, Any]]:
    """At heads, and at rows of attention matrices."""
    z, pattern = "blocks.1.attn.z", "blocks.1.attn.pattern"

    def edit(site: str, op: str = "interchange", **fields: Any) -> dict[str, Any]:
        own = {"source": "source"} if op == "interchange" else {"method": "zero"}
        return {"op": op, "site": site, "tokens": HERE, **own, **fields}

    return [
        run("both", edit(z)),
        run("both, there", edit(z, source_tokens=THERE)),
        run("both in turn", edit(z, heads=[1, 0])),
        run("both in turn, there", edit(z, heads=[1, 0], source_tokens=THERE)),
        run("first", edit(z, heads=[0])),
        run("first at cls", edit(z, heads=[0], tokens=["cls"])),
        run("second", edit(z, heads=[1])),
        run("drop the second", edit(z, "ablate", heads=[1])),
        run("drop the second to its mean", edit(z, "ablate", heads=[1], method="mean")),
        run("drop the second to its pooled mean", edit(z, "ablate", heads=[1], method="mean", pool_tokens=True)),
        run("queries", edit(pattern, heads=[1])),
        run("queries, there", edit(pattern, heads=[1], source_tokens=THERE)),
        run("some keys", edit(pattern, heads=[1], keys=[0, 1, 2])),
        run("other keys", edit(pattern, heads=[1], keys=["patches"])),
        run("drop queries", edit(pattern, "ablate")),
    ]


@pytest.mark.parametrize("runs", [residual, heads], ids=lambda make: make.__name__)
@pytest.mark.parametrize("batch_size", [3, 64])
def test_every_run_is_as_if_it_were_alone(world: World, runs: Any, batch_size: int) -> None:
    documents = runs(world)
    world.check(documents, world.execute(documents, batch_size=batch_size))


def test_one_operation_serves_all_that_can_go_together(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[str]] = []

    def noted(value: Tensor, group: Any) -> None:
        groups.append([own.edit.spec.op for own in group])
        stacking.edit_stack(value, group)

    monkeypatch.setattr(wave, "edit_stack", noted)
    d, site = world.module_width, "blocks.1.resid_post"
    pushes = [
        run(f"push {n}", {"op": "add_direction", "site": site, "vector": f"direction.{d}", "alpha": 1 + n, "tokens": [n]})
        for n in range(4)
    ]
    swaps = [
        run(f"swap {n}", {"op": "interchange", "site": site, "source": "source", "tokens": list(range(n + 1))})
        for n in range(3)
    ]
    world.check([*pushes, *swaps], world.execute([*pushes, *swaps], batch_size=64))
    assert groups == [["add_direction"] * 4, ["interchange"] * 3]


def test_directions_are_added_in_float32_and_rounded_once() -> None:
    world = World(TIMM_PLAIN, n=2, dtype=torch.bfloat16)
    alphas = [1 / 3, 0.7, -1.1]
    vector = world.tensors[f"direction.{world.module_width}"]
    pushes = [
        run(f"push {n}", {"op": "add_direction", "site": "embed", "vector": f"direction.{world.module_width}", "alpha": alpha,
                          "tokens": ["cls", 2]})
        for n, alpha in enumerate(alphas)
    ]  # fmt: skip
    documents = [{**document, "capture": ["embed"]} for document in pushes]
    results = world.execute(documents, batch_size=64)
    clean = world.oracle.clean("base")[1]["embed"]
    for n, alpha in enumerate(alphas):
        expected = clean.clone()
        expected[:, [0, 3]] = (clean[:, [0, 3]].float() + alpha * vector).bfloat16()
        assert torch.equal(results.captures[f"push {n}"]["embed"], expected)
        rounded_twice = clean[:, [0, 3]] + (alpha * vector).bfloat16()
        assert not torch.equal(expected[:, [0, 3]], rounded_twice)


def test_a_built_in_operator_serves_specs_of_ones_own() -> None:
    @register_op
    class Push(Intervention):
        """``h + v``."""

        op: Literal["push"] = "push"
        vector: TensorRef
        alpha: float = 1.0

    ops.register_operator(Push, by_token=True)(ops.add_direction)
    try:
        world = World(TIMM_PLAIN, n=3)
        d = world.module_width
        pushes = [
            run(f"push {alpha}", {"op": "push", "site": "blocks.1.resid_post", "vector": f"direction.{d}", "alpha": alpha, "tokens": HERE})
            for alpha in (1.0, 2.0)
        ]
        results = world.execute(pushes, batch_size=64)
        by_name = {name: [{**edit, "op": "add_direction"} for edit in document["interventions"]]
                   for document in pushes for name in [document["name"]]}  # fmt: skip
        world.check([run(name, *edits) for name, edits in by_name.items()], results)
    finally:
        OPS.pop("push")


def test_an_operator_of_ones_own_is_given_one_run_at_a_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def own(spec: AddDirection, h: Tensor, inputs: ops.Inputs) -> Tensor:
        seen.append(len(h))
        return ops.add_direction(spec, h, inputs)

    monkeypatch.setitem(ops._OPERATORS, AddDirection, own)
    d = world.module_width
    pushes = [
        run(
            f"push {n}",
            {"op": "add_direction", "site": "blocks.1.resid_post", "vector": f"direction.{d}", "alpha": 1.0 + n, "tokens": HERE},
        )
        for n in range(2)
    ]
    results = world.execute(pushes, batch_size=64)
    assert seen == [3 * world.n] * 2
    assert float((results["push 0"] - results["push 1"]).abs().max()) > 1e-3
    world.check(pushes, results)
    assert not torch.equal(results["push 0"], world.oracle.clean("base")[0])
