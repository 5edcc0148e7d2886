"""Experiments on compiled blocks and under autocast: the same numbers, by other kernels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.world import World
from tests.tiny_models import HF_DINOV2, TIMM_PLAIN, Tiny
from vit_mechinterp import Run
from vit_mechinterp.engine import prepare
from vit_mechinterp.errors import ExecutionError

Document = dict[str, Any]


def swap(site: str, **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": "source", "tokens": ["cls", 2], **fields}


DOCUMENTS: list[Document] = [
    {"name": "clean", "capture": ["blocks.0.resid_post"]},
    {"name": "a", "interventions": [swap("blocks.0.resid_post")], "capture": ["blocks.2.attn.pattern"]},
    {"name": "b", "interventions": [swap("blocks.1.attn.z", heads=[0])]},
    {"name": "c", "interventions": [swap("blocks.1.attn.z", heads=[1])]},
    {"name": "d", "interventions": [swap("blocks.1.mlp_out"), swap("blocks.2.resid_post")]},
]


class Backend:
    """A backend that runs what it is given, and counts."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0
        self.sizes: set[int] = set()

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def forward(*args: Any) -> Any:
            self.calls += 1
            return module.forward(*args)

        return forward


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_compiled_blocks_serve_growing_batches(tiny: Tiny) -> None:
    world = World(tiny, 4)
    world.vit.sites()
    backend = Backend()
    before = {name: dict(vars(module)) for name, module in world.module.named_modules()}
    assert world.vit.compile(backend=backend) is world.vit
    compiled = backend.graphs
    for batch_size in (20, 7, 3):
        calls = backend.calls
        results = world.execute(DOCUMENTS, batch_size=batch_size)
        assert backend.calls > calls
        world.check(DOCUMENTS, results)
    assert backend.graphs <= compiled + 2, "batches of other sizes were compiled for anew"
    assert results.provenance["compiled"]["backend"]
    runs = list(map(Run.model_validate, DOCUMENTS))
    plan = str(vmi.plan(world.vit, runs, world.columns))
    assert "the others compiled" in plan
    assert ("so does the last one, most of whose tokens are left out" in plan) == (tiny is TIMM_PLAIN)
    assert {name: dict(vars(module)) for name, module in world.module.named_modules()} == before
    calls = backend.calls
    world.check(DOCUMENTS, world.vit.uncompile() and world.execute(DOCUMENTS))
    assert backend.calls == calls


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_the_default_backend_gives_what_eager_blocks_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients of blocks compiled by inductor, in growing batches of several widths."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    world = World(TIMM_PLAIN, 4)
    world.vit.sites()
    edit = {"op": "inject_subspace", "site": "blocks.0.resid_post", "basis": "R", "source": "source"}
    run = Run.model_validate({"name": "r", "interventions": [edit]})
    basis = world.tensors[f"basis.{world.vit.layout.d_model}"]
    eager, found = world.execute(DOCUMENTS, batch_size=7), []
    for compiled in (False, True):
        if compiled:
            world.vit.compile()
        tensors = {"R": basis.clone().requires_grad_()}
        with prepare(world.vit, run, world.columns, tensors, progress=False) as prepared:
            prepared([0, 2], tensors).square().sum().backward()
        found.append(tensors["R"].grad)
    for batch_size in (20, 7, 3):
        results = world.execute(DOCUMENTS, batch_size=batch_size)
        world.check(DOCUMENTS, results)
        assert float((results.logits - eager.logits).abs().max()) < 1e-5 * world.scale
    assert not torch.equal(results.logits, eager.logits)  # other kernels did run
    assert float((found[0] - found[1]).abs().max()) < 1e-4 * float(found[0].abs().max())


def test_hooks_inside_a_block_still_see_what_passes() -> None:
    world = World(TIMM_PLAIN, 4)
    world.vit.sites()
    world.vit.compile(backend=Backend())
    seen: list[int] = []
    hook = world.module.blocks[1].mlp.fc1.register_forward_hook(lambda m, args, output: seen.append(len(output)))
    with world.vit.hooks({"blocks.0.mlp.post": lambda h: h * 0}):
        changed = world.vit(world.columns["base"])
    hook.remove()
    assert seen == [4]
    assert not torch.allclose(changed, world.oracle.clean("base")[0], atol=1e-3)


def test_gradients_pass_through_compiled_blocks() -> None:
    world = World(TIMM_PLAIN, 4)
    world.vit.sites()
    edit = {"op": "inject_subspace", "site": "blocks.0.resid_post", "basis": "R", "source": "source"}
    run = Run.model_validate({"name": "r", "interventions": [edit]})
    basis = world.tensors["basis.24"]
    found = []
    for compiled in (False, True):
        if compiled:
            world.vit.compile(backend="aot_eager")
        tensors = {"R": basis.clone().requires_grad_()}
        with prepare(world.vit, run, world.columns, tensors, progress=False) as prepared:
            prepared([0, 2], tensors).square().sum().backward()
        found.append(tensors["R"].grad)
    assert float(found[0].abs().max()) > 1e-2
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


def test_what_cannot_be_compiled_is_refused_in_words() -> None:
    world = World(TIMM_PLAIN, 2)

    def broken(module: torch.fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    with pytest.raises(ExecutionError, match=r"VisionTransformer cannot be compiled.*no compiler here.*C\+\+"):
        world.vit.compile(backend=broken)
    assert world.vit.compiled is None
    assert world.vit(world.columns["base"]).shape == (2, 5)


def test_a_store_and_a_folder_tell_autocast_apart(tmp_path: Path) -> None:
    """Values of the lower precision are none for an experiment without it, and the other way round."""
    world = World(TIMM_PLAIN, 4)
    swap = vmi.Interchange(site="blocks.1.resid_post", tokens=["cls", 2], source="source")
    run, site = vmi.Run(name="a", interventions=[swap]), "blocks.1.resid_mid"

    def found(low: bool, **options: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return vmi.execute(world.vit, run, world.columns, progress=False, **options).logits

    exact = found(low=False)

    def is_rounded(logits: torch.Tensor) -> bool:
        error = float((logits - exact).abs().max()) / world.scale
        assert not 1e-5 < error < 1e-4
        return error >= 1e-4

    assert is_rounded(found(low=True))
    with vmi.ActivationStore() as store:
        assert [is_rounded(found(low=low, store=store)) for low in (True, False, True)] == [True, False, True]
    with vmi.ActivationStore(host="4KiB") as store:  # holds nothing, so that what is read is computed anew
        with torch.autocast("cpu", torch.bfloat16):
            streams = store.capture(world.vit, world.columns, site, progress=False)[site]
            wanted = world.vit.run(world.columns["base"], capture=[site])[1][site]
        assert torch.equal(streams[:].to(wanted.dtype), wanted)
        assert not torch.equal(wanted, world.vit.run(world.columns["base"], capture=[site])[1][site].to(wanted.dtype))
    found(low=True, out=tmp_path)
    with pytest.raises(ExecutionError, match=r"the dtype differs \(float32, aut"):
        found(low=False, out=tmp_path)


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_autocast_gives_what_one_run_at_a_time_gives_under_it(tiny: Tiny) -> None:
    world = World(tiny, 4)
    site = "blocks.1.resid_post"
    runs = [
        vmi.Run(name="a", interventions=[vmi.Interchange(site=site, tokens=["cls", 2], source="source")]),
        vmi.Run(name="z", interventions=[vmi.Interchange(site="blocks.1.attn.z", heads=[0], source="source")]),
    ]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        results = vmi.execute(world.vit, runs, world.columns, progress=False)
        clean = world.vit(world.columns["base"]).float()
        for run, where in zip(runs, (site, "blocks.1.attn.z"), strict=True):
            _, cache = world.vit.run(world.columns["source"], capture=[where])
            first = len(tiny.prefix)

            def exchange(h: torch.Tensor, where: str = where, source: Any = cache, first: int = first) -> torch.Tensor:
                rows = (slice(None), [0, first + 2]) if where == site else (slice(None), slice(None), 0)
                h[rows] = source[where][rows]
                return h

            with world.vit.hooks({where: exchange}):
                wanted = world.vit(world.columns["base"]).float()
            assert float((wanted - clean).abs().max()) > 0.1 * world.scale
            assert float((results[run.name] - wanted).abs().max()) < 0.03 * world.scale
    assert results.provenance["autocast"] == "bfloat16"
