"""A subspace for each token of an object, and the training itself, against forwards and loops written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional

import vit_mechinterp as vmi
from tests.circuits.test_das import EDITED, PATCH, QUICK, SOURCE, D, by_hand, pairs, vit
from vit_mechinterp.circuits import subspace_training
from vit_mechinterp.circuits.alignment import GatedRotations
from vit_mechinterp.circuits.das import das, interchange_run
from vit_mechinterp.errors import DataError

assert vit  # the fixture


def test_every_token_of_an_object_can_have_a_subspace_of_its_own(vit: vmi.HookedViT) -> None:
    train, test = pairs(24, 8, vit), pairs(24, 9, vit)
    result = das(vit, train, test, tied=False, layers=[0, 1], **QUICK)
    labels = test["counterfactual_label"]
    first = GatedRotations([0, 1], D, n_tokens=4)
    for row in result.table.itertuples():
        rotation, gate = (result.tensors[f"{name}_{row.layer}"] for name in ("rotation", "gate"))
        assert (rotation.shape, gate.shape) == ((4, D, D), (4, D))
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(D).expand(4, -1, -1), rtol=0, atol=1e-5)
        with torch.no_grad():
            logits = by_hand(vit.module, test, row.layer, rotation, gate)
            shifted = by_hand(vit.module, test, row.layer, rotation.roll(1, 0), gate.roll(1, 0))
        assert row.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), abs=1e-4)
        assert (logits - shifted).abs().max() > 0.05
        assert row.accuracy == (logits.argmax(dim=1) == labels).double().mean().item()
        assert row.rank == gate.sum().item() / 4
        for token in range(4):
            assert (rotation[token] - first.rotation[row.layer, token]).abs().max() > 0.02
            assert (rotation[token] - rotation[token - 1]).abs().max() > 0.1
    assert "one for each token of an object" in result.description
    assert result.provenance["training"]["tied"] is False
    run = interchange_run(0, "resid_post", EDITED, SOURCE)
    found = vmi.execute(vit, run, test, tensors=result.tensors, progress=False).logits[0]
    assert (found.argmax(dim=1) == labels).double().mean().item() == result.table["accuracy"][0]


@pytest.mark.parametrize("tied", [True, False])
def test_the_training_is_that_of_a_loop_written_by_hand(
    vit: vmi.HookedViT, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In double precision: while all gates are half open, a rotation's gradient is rounding alone, which Adam scales up."""
    monkeypatch.setattr(subspace_training, "GatedRotations", lambda *args: GatedRotations(*args).double())
    data = pairs(8, 4, vit)
    data |= {name: data[name].double() for name in ("base", "source")}
    vit = vmi.wrap(copy.deepcopy(vit.module).double())
    settings: dict[str, Any] = {"epochs": 6, "batch_size": 8, "learning_rate": 1e-3, "mask_learning_rate": 0.2, "sparsity": 0.02}
    result = das(vit, data, data, tied=tied, layers=[0], permute_sources=False, progress=False, **settings)
    modules = GatedRotations([0], D, n_tokens=None if tied else 4).double()
    rotation, mask = modules.parametrizations["rotation"].original, modules.mask  # type: ignore[index]
    optimizer = torch.optim.Adam([{"params": [rotation], "lr": 1e-3}, {"params": [mask], "lr": 0.2}])
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for epoch in range(6):
        # One step in an epoch: a tenth of six steps is one, at half the rate; then down to nothing.
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (0.5 if epoch == 0 else (6 - epoch) / 5)
        gate = torch.sigmoid(modules.mask[0] * 200 ** (epoch / 5))
        logits = by_hand(vit.module, data, 0, modules.rotation[0], gate)
        penalty = gate.sum() if tied else gate.sum() / 4
        loss = functional.cross_entropy(logits, data["counterfactual_label"]) + 0.02 * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert result.table["train_loss"][0] == pytest.approx(losses[-1], rel=1e-5)
    assert losses[-1] < losses[0] - 0.05
    torch.testing.assert_close(result.tensors["rotation_0"].double(), modules.rotation[0].detach(), rtol=0, atol=1e-5)
    assert torch.equal(result.tensors["gate_0"], (mask[0] > 0).to(result.tensors["gate_0"]))
    assert 0 < float(result.tensors["gate_0"].mean()) < 1


def test_the_penalty_of_untied_gates_is_their_mean_over_tokens(vit: vmi.HookedViT) -> None:
    train = pairs(8, 4, vit)
    still = {**QUICK, "epochs": 1, "learning_rate": 0.0, "mask_learning_rate": 0.0, "layers": [0]}
    for tied in (True, False):
        with_penalty, without = (das(vit, train, train, tied=tied, sparsity=s, **still).table["train_loss"][0] for s in (1.0, 0.0))
        assert with_penalty - without == pytest.approx(0.5 * D, rel=1e-4)  # every gate is half open


def test_objects_of_unequal_numbers_of_tokens_have_no_untied_subspaces(vit: vmi.HookedViT) -> None:
    data = pairs(4, 1, vit)
    data["edited_box"][2, 2] -= PATCH
    with pytest.raises(DataError, match=r"need equally many tokens; here they have 4 \(example 0\) and 2 \(example 2\)"):
        das(vit, data, data, tied=False, **QUICK)
