"""A model in float64: its trainings round to float32 in no place."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.engine.test_prepare import FORMULAS, leaves
from tests.engine.world import World
from tests.oracles import by_hand
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import Run
from vit_mechinterp.engine import prepare


def test_a_model_in_float64_is_trained_in_float64() -> None:
    world = World(TIMM_PLAIN, 3, torch.float64)
    document, formula = FORMULAS["direction"]
    run = Run.model_validate({"name": "r", "interventions": [{**document, "site": "blocks.1.resid_post"}]})
    tensors = {"v": leaves(world.module_width)["v"].detach().double().requires_grad_()}
    with prepare(world.vit, [run], world.columns, tensors, progress=False) as prepared:
        (outputs,) = prepared(range(3), tensors)
    (found,) = torch.autograd.grad(outputs.square().sum(), list(tensors.values()))

    def touch(site: str, value: Tensor) -> Tensor:
        return formula(value, value, tensors) if site == "blocks.1.resid_post" else value

    expected = by_hand(world.module, world.columns["base"].double(), touch)
    (wanted,) = torch.autograd.grad(expected.square().sum(), list(tensors.values()))
    assert outputs.dtype == torch.float64
    outputs, expected = outputs.detach(), expected.detach()
    assert float((outputs - expected).abs().max()) < 1e-12 * world.scale
    clean = world.module(world.columns["base"].double()).detach()
    assert float((expected - clean).abs().max()) > 1e-3
    assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())
