"""The auxiliary losses outside `train`: in a loop of one's own, differentiable through the tap, on any model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import vit_mechinterp as vmi
from tests.training.test_any_model import SIZES
from vit_mechinterp.errors import SpecError
from vit_mechinterp.stimuli import DiscriminationGenerator, RMTSGenerator
from vit_mechinterp.training import (
    DisentanglementProbes,
    IdentityProbe,
    PipelineStage,
    RelationProbes,
    TrainingConfig,
    pipeline_loss,
    token_positions,
)
from vit_mechinterp.training.auxiliary import make_probes

IMAGES: dict[str, Any] = {"canvas": 32, "patch": 8, "cell": 16}
SITE = "blocks.0.resid_post"
STAGES = (
    PipelineStage(attention="within_object", layers=(0,)),
    PipelineStage(attention="within_pair", layers=(1,), heads=(1,)),
)


def transformers_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SIZES, num_labels=2, hidden_act="gelu_new", attn_implementation="sdpa")
    module = ViTForImageClassification(config).double().eval()
    for layer in module.vit.layers:  # attention far from uniform
        layer.attention.q_proj.weight.data *= 30
        layer.attention.k_proj.weight.data *= 30
    return module


@pytest.fixture(scope="module")
def batch() -> Any:
    return DiscriminationGenerator(**IMAGES).batch(0, 6)


def test_the_losses_gradients_through_the_tap_equal_finite_differences(batch: Any) -> None:
    torch.manual_seed(3)
    module = transformers_vit()
    vit, probes = vmi.wrap(module), DisentanglementProbes(SIZES["hidden_size"]).double()
    tokens = token_positions(vit, torch.from_numpy(batch.tokens))
    shape, color = torch.from_numpy(batch.shape), torch.from_numpy(batch.color)

    def loss() -> torch.Tensor:
        capture = [SITE, "blocks.*.attn.pattern"]
        _, cache = vit.run(batch.images().double(), capture=capture)
        return probes(cache[SITE], tokens, shape, color).total + pipeline_loss(cache, tokens, STAGES)

    weight = module.vit.layers[0].attention.q_proj.weight
    others = module.vit.layers[0].mlp.fc1.weight
    for parameter, reached in ((weight, True), (others, True), (module.classifier.weight, False)):
        module.zero_grad()
        loss().backward()
        if not reached:
            assert parameter.grad is None
            continue
        direction = torch.randn_like(parameter)
        slope = float((parameter.grad * direction).sum())
        with torch.no_grad():
            step = 1e-5
            parameter += step * direction
            above = float(loss())
            parameter -= 2 * step * direction
            below = float(loss())
            parameter += step * direction
        assert slope == pytest.approx((above - below) / (2 * step), rel=1e-5)
        assert abs(slope) > 1e-4


def test_the_losses_equal_those_of_plain_hooks_and_eager_attention(batch: Any) -> None:
    torch.manual_seed(3)
    module = transformers_vit().float()
    vit, probes = vmi.wrap(module), DisentanglementProbes(SIZES["hidden_size"])
    tokens = token_positions(vit, torch.from_numpy(batch.tokens))
    assert torch.equal(tokens, torch.from_numpy(batch.tokens) + 1)
    shape, color = torch.from_numpy(batch.shape), torch.from_numpy(batch.color)
    _, cache = vit.run(batch.images(), capture=[SITE, "blocks.*.attn.pattern"])
    found = probes(cache[SITE], tokens, shape, color), pipeline_loss(cache, tokens, STAGES)

    module.set_attn_implementation("eager")
    native = module(batch.images(), output_hidden_states=True, output_attentions=True)
    halves = torch.stack([native.hidden_states[1][k, row] for k, row in enumerate(tokens.flatten(1))])
    targets = shape.repeat_interleave(4, 1).flatten(), color.repeat_interleave(4, 1).flatten()
    expected = [
        functional.cross_entropy(probe(part.flatten(0, 1)), target)
        for probe, part, target in zip((probes.shape, probes.color), halves.chunk(2, -1), targets, strict=True)
    ]
    torch.testing.assert_close(found[0].total, sum(expected), rtol=1e-5, atol=1e-6)

    def share(layer: int, head: int, image: int, x: int, y: int) -> torch.Tensor:
        rows = native.attentions[layer][image, head][tokens[image, x]]
        return rows[:, tokens[image, y]].sum() / rows.sum()

    own = [(share(0, h, i, 0, 0) + share(0, h, i, 1, 1)) / 2 for h in range(2) for i in range(6)]
    pair = [(share(1, 1, i, 0, 1) + share(1, 1, i, 1, 0)) / 2 for i in range(6)]
    terms = [-torch.stack(values).log().mean() for values in (own, pair)]
    torch.testing.assert_close(found[1], torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)
    assert abs((terms[0] - terms[1]).item()) > 1e-2


def test_relation_probes_read_a_pair_at_once_and_each_pair_has_its_own() -> None:
    batch = RMTSGenerator(canvas=64, patch=8, cell=16).batch(0, 8)
    tokens = torch.from_numpy(batch.tokens)
    shape, color = torch.from_numpy(batch.shape), torch.from_numpy(batch.color)
    hidden = torch.randn(8, 64, 6)
    probes = RelationProbes(6, 4, 2)
    found = probes(hidden, tokens, shape, color)
    losses = []
    for image in range(8):
        for pair in range(2):
            objects = (2 * pair, 2 * pair + 1)
            vector = torch.cat([hidden[image, t] for o in objects for t in tokens[image, o]])
            same = int(shape[image, objects[0]] == shape[image, objects[1]])
            same &= int(color[image, objects[0]] == color[image, objects[1]])
            losses.append(functional.cross_entropy(probes.relation[pair](vector), torch.tensor(same)))
    torch.testing.assert_close(found.total, torch.stack(losses).mean())
    assert set(found.log()) == {"probe_relation", "probe_relation_accuracy"}


def test_the_control_asks_for_the_object_from_the_whole_embedding(batch: Any) -> None:
    tokens = torch.from_numpy(batch.tokens)
    shape, color = torch.from_numpy(batch.shape), torch.from_numpy(batch.color)
    hidden = torch.randn(6, 16, 8, requires_grad=True)
    probe = IdentityProbe(8)
    assert probe.identity.out_features == 256
    found = probe(hidden, tokens, shape, color)
    target = (16 * color + shape)[..., None].expand_as(tokens).flatten()
    rows = torch.stack([hidden[i, t] for i in range(6) for t in tokens[i].flatten()])
    torch.testing.assert_close(found.total, functional.cross_entropy(probe.identity(rows), target))
    found.total.backward()
    assert hidden.grad is not None
    assert (hidden.grad[0, tokens[0, 0, 0]] != 0).all()


def test_probes_have_the_authors_names_too() -> None:
    assert TrainingConfig(auxiliary_probe="cls").auxiliary_probe == "pair-relation"
    assert TrainingConfig(auxiliary_probe="control").auxiliary_probe == "object-identity"
    with pytest.raises(SpecError, match=r"no probes 'shape'.*Close matches: shape-color"):
        make_probes("shape", 8, tokens_per_object=4, n_pairs=1)


def test_the_loop_of_the_document_runs() -> None:
    document = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    loop = next(block for block in re.findall(r"```python\n(.*?)```", document, re.S) if "pipeline_loss" in block)
    names: dict[str, Any] = {}
    exec(loop, names)
    assert float(names["loss"].detach()) > 0
    assert names["probes"].shape.weight.grad.abs().sum() > 0
