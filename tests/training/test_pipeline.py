"""The pipeline loss, against its formula written out query by query."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from tests.training.test_training import tiny
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.registry import wrap
from vit_mechinterp.stimuli import RMTSGenerator
from vit_mechinterp.training import DisentanglementProbes, PipelineStage, objective, pipeline_loss, train
from vit_mechinterp.training.models import build_model
from vit_mechinterp.training.pipeline import active

BATCH, HEADS, TOKENS = 3, 2, 12


@pytest.fixture
def pattern() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, HEADS, TOKENS, TOKENS, generator=generator).softmax(dim=-1)


@pytest.fixture
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(TOKENS, generator=generator)[:8].reshape(4, 2) for _ in range(BATCH)])


def mass(pattern: torch.Tensor, image: int, head: int, queries: list[int], keys: list[int]) -> float:
    """Attention from queries to keys over all attention of the queries."""
    total = sum(float(pattern[image, head, q].sum()) for q in queries)
    return sum(float(pattern[image, head, q, k]) for q in queries for k in keys) / total


ROUTES = {
    "within_object": [(0, 0), (1, 1), (2, 2), (3, 3)],
    "within_pair": [(0, 1), (1, 0), (2, 3), (3, 2)],
    "between_pairs": [(0, 2), (0, 3), (1, 2), (1, 3), (2, 0), (2, 1), (3, 0), (3, 1)],
}


@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("heads", [None, (1,)])
def test_a_stage_equals_the_formula(
    pattern: torch.Tensor, tokens: torch.Tensor, kind: str, heads: tuple[int, ...] | None
) -> None:
    losses = []
    for image in range(BATCH):
        for head in heads or range(HEADS):
            own = [row.tolist() for row in tokens[image]]
            routes = [mass(pattern, image, head, own[x], own[y]) for x, y in ROUTES[kind]]
            losses.append(-math.log(sum(routes) / len(routes)))
    stage = PipelineStage(attention=kind, layers=(0,), heads=heads)
    found = pipeline_loss({"blocks.0.attn.pattern": pattern}, tokens, [stage])
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_layers_count_alike(pattern: torch.Tensor, tokens: torch.Tensor) -> None:
    patterns = {"blocks.0.attn.pattern": pattern, "blocks.3.attn.pattern": pattern.flip(0)}
    whole = PipelineStage(attention="within_object", layers=(0, 3))
    parts = [PipelineStage(attention="within_object", layers=(layer,)) for layer in (0, 3)]
    one, two = (pipeline_loss(patterns, tokens, [part]) for part in parts)
    assert abs(one - two) > 1e-3
    torch.testing.assert_close(pipeline_loss(patterns, tokens, [whole]), (one + two) / 2)
    torch.testing.assert_close(pipeline_loss(patterns, tokens, parts), (one + two) / 2)


def test_a_head_without_such_attention_has_a_finite_loss(tokens: torch.Tensor) -> None:
    pattern = torch.zeros(BATCH, HEADS, TOKENS, TOKENS, requires_grad=True)
    stage = PipelineStage(attention="within_object", layers=(0,))
    loss = pipeline_loss({"blocks.0.attn.pattern": pattern}, tokens, [stage])
    loss.backward()
    assert math.isfinite(loss.item())
    assert pattern.grad is not None
    assert pattern.grad.isfinite().all()


def test_stages_are_switched_on_and_off() -> None:
    early = PipelineStage(attention="within_object", layers=(0,), last_step=5)
    late = PipelineStage(attention="within_pair", layers=(1,), first_step=3)
    assert active((early, late), 0) == (early,)
    assert active((early, late), 4) == (early, late)
    assert active((early, late), 5) == (late,)


def test_the_loss_of_a_step_is_the_sum_of_its_terms_and_moves_the_heads() -> None:
    stages = (
        PipelineStage(attention="within_object", layers=(0,)),
        PipelineStage(attention="between_pairs", layers=(1,), heads=(0,)),
    )
    config = tiny(task="rmts", pipeline=stages, pipeline_weight=0.5, auxiliary_weight=0.0)
    module = build_model(config)
    batch = RMTSGenerator(canvas=32, patch=8, cell=8).batch(0, 8)
    found = objective(wrap(module), DisentanglementProbes(16), batch, config)

    patterns: dict[str, torch.Tensor] = {}
    for layer, block in enumerate(module.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(
            lambda _, inputs, output, layer=layer: patterns.__setitem__(f"blocks.{layer}.attn.pattern", output)
        )
    logits = module(batch.images())
    tokens = torch.from_numpy(batch.tokens) + 1
    pipeline = pipeline_loss(patterns, tokens, stages)
    task = functional.cross_entropy(logits, batch.labels())
    torch.testing.assert_close(found.loss, task + 0.5 * pipeline, rtol=1e-5, atol=1e-6)
    assert pipeline > 0.5
    found.loss.backward()
    assert module.blocks[1].attn.qkv.weight.grad.abs().max() > 0


def test_training_with_every_loss_lowers_the_pipeline_loss(tmp_path) -> None:
    import json

    stages = [{"attention": "within_object", "layers": [0]}, {"attention": "between_pairs", "layers": [1]}]
    config = tiny(task="rmts", pipeline=stages, steps=24)
    train(config, tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["pipeline_loss"] for line in lines if "pipeline_loss" in line]
    assert losses[-1] < losses[0] - 0.05
    document = json.loads((tmp_path / "run" / "training.json").read_text())
    assert "accuracy_sample_same_display_same" in document["test"]["test"]


def test_a_training_can_start_from_another_models_weights(tmp_path) -> None:
    first = train(tiny(steps=4), tmp_path / "first", progress=False)
    config = tiny(task="rmts", initial=f"timm/./{first.folder.name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        module = build_model(config)
    from safetensors.torch import load_file

    weights = load_file(first.folder / "model.safetensors")
    assert all(torch.equal(module.state_dict()[name], value) for name, value in weights.items())
    assert not torch.equal(build_model(tiny()).state_dict()["head.weight"], weights["head.weight"])


def test_bad_stages_are_named_before_the_first_step(tmp_path) -> None:
    def stage(**changes: object) -> tuple[PipelineStage, ...]:
        return (PipelineStage(**{"attention": "within_object", "layers": (0,), **changes}),)

    with pytest.raises(SpecError, match=r"names heads \[7\]; the model's are 0 to 1"):
        train(tiny(pipeline=stage(heads=(7,))), tmp_path / "a", progress=False)
    with pytest.raises(SpecError, match=r"blocks\.9\.attn\.pattern"):
        train(tiny(pipeline=stage(layers=(9,))), tmp_path / "b", progress=False)
    with pytest.raises(SpecError, match="between_pairs needs two pairs of objects, and an image of discrim"):
        train(tiny(pipeline=stage(attention="between_pairs")), tmp_path / "c", progress=False)
    with pytest.raises(ValidationError, match="within_object"):
        PipelineStage(attention="inside", layers=(0,))
    with pytest.raises(ValidationError, match="at least 1 item"):  # the mean over no head is no number
        stage(heads=())
    with pytest.raises(ValidationError, match="off at step 3 and on at step 3, so it would never act"):
        stage(first_step=3, last_step=3)
    with pytest.raises(SpecError, match="is a model of other sizes than the one to train"):
        build_model(tiny(initial="vmi/discrimination-plain"))
