"""The same on every device that is there: numbers, stores, budgets and gradients, against raw hooks on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vit_mechinterp as vmi
from tests.engine.world import World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import ActivationStore, InjectSubspace, Run
from vit_mechinterp.engine import prepare

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
DOCUMENTS: list[dict[str, Any]] = [
    {
        "name": "composed",
        "interventions": [
            {"op": "interchange", "site": "blocks.0.resid_post", "source": "source", "tokens": {"column": "here"}},
            {"op": "ablate", "site": "blocks.1.attn.z", "method": "mean", "heads": [1]},
            {"op": "add_direction", "site": "blocks.2.resid_pre", "tokens": "cls", "vector": "direction.24", "alpha": 2.0},
        ],
        "capture": ["blocks.1.attn.pattern", "blocks.2.resid_mid"],
    },
    {
        "name": "reader",
        "interventions": [
            {
                "op": "inject_subspace", "site": "blocks.1.mlp_out", "tokens": [1, 4], "basis": "basis.24",
                "source": {"run": "composed"},
            },
        ],
    },
]  # fmt: skip


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """With products of full precision, as the oracle's are."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(before)


def there(device: torch.device, n: int = 6) -> tuple[World, vmi.HookedViT]:
    """Examples and an oracle on the CPU, and a copy of the model on a device."""
    world = World(TIMM_PLAIN, n)
    return world, vmi.wrap(TIMM_PLAIN.module(torch.float32).to(device))


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def test_a_composed_experiment_is_that_of_raw_hooks(device: torch.device) -> None:
    world, vit = there(device)
    results = vmi.execute(
        vit, list(map(Run.model_validate, DOCUMENTS)), world.columns, world.named(DOCUMENTS), progress=False
    )
    world.check(DOCUMENTS, results)
    assert results.logits.device.type == "cpu"


@pytest.mark.parametrize("budgets", [{"gpu": "64MiB"}, {"gpu": 0, "host": "64MiB"}, {"gpu": "9KiB", "host": "9KiB"}])
def test_a_store_gives_the_same_bits_from_wherever_it_keeps_them(
    device: torch.device, budgets: dict[str, Any], tmp_path: Path
) -> None:
    """On the device, in pinned memory, and, when neither holds all, in files."""
    world, vit = there(device)
    runs = list(map(Run.model_validate, DOCUMENTS))
    given = world.named(DOCUMENTS)
    found = []
    with ActivationStore(tmp_path, **budgets) as store:
        for _ in range(2):
            found.append(vmi.execute(vit, runs, world.columns, given, store=store, progress=False, batch_size=4))
        assert vmi.plan(vit, runs, world.columns, given, store=store, batch_size=4).clean == ()
        streams = store.capture(vit, world.columns, "blocks.1.resid_post", progress=False)["blocks.1.resid_post"]
        shuffled = streams[[4, 0, 5]]
    assert torch.equal(found[0].logits, found[1].logits)
    world.check(DOCUMENTS, found[0])
    assert close(shuffled.cpu(), world.oracle.clean("base")[1]["blocks.1.resid_post"][[4, 0, 5]])


def test_a_gradient_is_that_of_the_cpu(device: torch.device) -> None:
    world, vit = there(device)
    start = torch.linalg.qr(torch.randn(24, 3, generator=torch.Generator().manual_seed(5))).Q
    run = Run(
        name="trained",
        interventions=[InjectSubspace(site="blocks.1.resid_post", tokens=[0, 3], source="source", basis="R")],
    )
    gradients = []
    for own in (vit, vmi.wrap(TIMM_PLAIN.module(torch.float32))):
        basis = start.to(own.device).requires_grad_()
        with prepare(own, [run], world.columns, {"R": basis}, progress=False) as prepared:
            prepared([0, 2, 5], {"R": basis}).square().sum().backward()
        assert basis.grad is not None
        gradients.append(basis.grad.cpu())
    assert gradients[1].abs().max() > 0
    assert float((gradients[0] - gradients[1]).abs().max()) <= 1e-4 * float(gradients[1].abs().max())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_budget_of_the_gpu_is_kept() -> None:
    """By the allocator's peak above the level before."""
    world, vit = there(torch.device("cuda"), 64)
    runs = [
        Run.model_validate({**DOCUMENTS[0], "name": f"{n}", "capture": []} | {"base": "base"}) for n in range(4)
    ]
    given = world.named(DOCUMENTS)
    vmi.execute(vit, runs, world.columns, given, progress=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    budget = 2 * 1024**2
    vmi.execute(vit, runs, world.columns, given, memory=budget, progress=False)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * budget
