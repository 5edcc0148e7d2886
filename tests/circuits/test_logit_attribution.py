"""Direct logit attribution against sums written out by hand, and on a model of whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.circuits.integer_vit import integer_images, integer_vit
from tests.oracles import by_hand
from tests.tiny_models import (
    HF_CLIP,
    HF_DINOV2,
    HF_VIT,
    N_LAYERS,
    TIMM_PLAIN,
    TIMM_POOLED,
    TIMM_REGISTERS,
    Tiny,
    stirred,
)
from vit_mechinterp.circuits.logit_attribution import logit_attribution
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.tail import linear_readout

TINIES = (TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED, HF_VIT, HF_DINOV2, HF_CLIP)
CLASS = 1
N = 2
DIRECTIONS = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def held(norm: nn.LayerNorm, stream: Tensor, part: Tensor) -> Tensor:
    """A layer norm without its bias, whose scale is that of ``stream``."""
    sigma = (stream.var(dim=-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return norm.weight * (part - part.mean(dim=-1, keepdim=True)) / sigma


def worth(tiny: Tiny, module, stream: Tensor, part: Tensor) -> Tensor:
    """What a part of the last stream adds to the logit: the readout of each model, written out."""
    if tiny is TIMM_POOLED:
        return held(module.fc_norm, stream.mean(1), part.mean(1)) @ module.head.weight[CLASS]
    if tiny in (TIMM_PLAIN, TIMM_REGISTERS):
        return held(module.norm, stream[:, 0], part[:, 0]) @ module.head.weight[CLASS]
    if tiny is HF_VIT:
        return held(module.vit.layernorm, stream[:, 0], part[:, 0]) @ module.classifier.weight[CLASS]
    if tiny is HF_CLIP:
        pooled = held(module.vision_model.post_layernorm, stream[:, 0], part[:, 0])
        return pooled @ module.visual_projection.weight.T @ DIRECTIONS[CLASS]
    normed = held(module.dinov2_with_registers.layernorm, stream, part)
    pooled = torch.cat([normed[:, 0], normed[:, 1 + module.config.num_register_tokens :].mean(1)], dim=1)
    return pooled @ module.classifier.weight[CLASS]


@pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.name)
@torch.no_grad()
def test_every_part_is_the_hand_made_one_and_they_sum_to_the_logit(tiny: Tiny) -> None:
    module, images = tiny.module(), tiny.images(N, seed=5)
    values: dict[str, Tensor] = {}

    def keep(site: str, value: Tensor) -> Tensor:
        values[site] = value
        return value

    output = by_hand(module, images, keep)
    directions = DIRECTIONS if tiny is HF_CLIP else None
    logit = output @ DIRECTIONS[CLASS] if tiny is HF_CLIP else output[:, CLASS]
    stream = values[f"blocks.{N_LAYERS - 1}.resid_post"]
    result = logit_attribution(
        vmi.wrap(module), images, answer=CLASS, directions=directions, top_neurons=10_000, progress=False
    )
    table = result.table.set_index(["kind", "part", "layer", "head", "neuron", "token"])["contribution"]
    rows = result.table

    def total(kind: str, **where: int) -> float:
        own = rows[rows["kind"] == kind]
        for name, number in where.items():
            own = own[own[name] == number]
        return float(own["contribution"].sum())

    assert np.isclose(total("component"), float(logit.mean()), atol=1e-4)
    constant = float(rows[rows["part"] == "constant"]["contribution"].iloc[0])
    assert np.isclose(total("token") + constant, float(logit.mean()), atol=1e-4)
    assert 0 <= result.provenance["residual"] < 1e-5
    expected = {("embed", None): worth(tiny, module, stream, values["embed"])}
    for layer in range(N_LAYERS):
        for site in ("attn_out", "mlp_out"):
            expected[site, layer] = worth(tiny, module, stream, values[f"blocks.{layer}.{site}"])
    components = rows[rows["kind"] == "component"]
    assert len(components) == len(expected) + 1
    for (part, layer), number in expected.items():
        own = components[components["part"] == part]
        own = own if layer is None else own[own["layer"] == layer]
        assert float(number.abs().max()) > 1e-4
        assert np.isclose(own["contribution"].item(), float(number.mean()), atol=2e-5)
        assert np.isclose(own["example_contribution"].item(), float(number[0]), atol=2e-5)
    for layer in range(N_LAYERS):
        result_, v = values[f"blocks.{layer}.attn.result"], values[f"blocks.{layer}.attn.v"]
        pattern = values[f"blocks.{layer}.attn.pattern"]
        brought = torch.zeros(tiny.n_tokens)
        for head in range(tiny.n_heads):
            own = worth(tiny, module, stream, result_[:, :, head])
            row = rows[(rows["part"] == "head") & (rows["layer"] == layer) & (rows["head"] == head)]
            assert np.isclose(row["contribution"].item(), float(own.mean()), atol=2e-5)
            # Only one token's value left: z is linear in the values.
            out = output_weight(tiny, module, layer, head)
            for token in range(tiny.n_tokens):
                z = torch.einsum("bq,bd->bqd", pattern[:, head, :, token], v[:, token, head])
                brought[token] += worth(tiny, module, stream, z @ out.T).mean()
        sources = rows[(rows["kind"] == "source") & (rows["layer"] == layer)]
        assert np.allclose(sources["contribution"], brought.numpy(), atol=5e-5)
        assert np.isclose(sum(brought.tolist()), total("head", layer=layer) - bias_of(rows, layer), atol=1e-4)
        assert np.isclose(total("head", layer=layer), float(expected["attn_out", layer].mean()), atol=1e-4)
        weight, post = neuron_weight(tiny, module, layer), values[f"blocks.{layer}.mlp.post"]
        for neuron in range(0, post.shape[-1], 7):
            own = worth(tiny, module, stream, post[:, :, neuron, None] * weight[:, neuron])
            row = rows[(rows["kind"] == "neuron") & (rows["layer"] == layer) & (rows["neuron"] == neuron)]
            assert np.isclose(row["contribution"].item(), float(own.mean()), atol=2e-5)
    assert len(table) == len(rows)
    assert set(result.figures()) <= set(result.captions)


def bias_of(rows, layer: int) -> float:
    return float(rows[(rows["kind"] == "head") & (rows["part"] == "bias") & (rows["layer"] == layer)]["contribution"].iloc[0])


def blocks(tiny: Tiny, module):
    if tiny in (TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED):
        return module.blocks
    if tiny is HF_VIT:
        return module.vit.layers
    return module.vision_model.encoder.layers if tiny is HF_CLIP else module.dinov2_with_registers.encoder.layer


def output_weight(tiny: Tiny, module, layer: int, head: int) -> Tensor:
    """The columns of the output projection that read a head, behind LayerScale."""
    block = blocks(tiny, module)[layer]
    attention = getattr(block, "attn", None) or getattr(block, "self_attn", None) or block.attention
    projection = next(getattr(attention, name) for name in ("proj", "o_proj", "out_proj") if hasattr(attention, name))
    own = projection.weight[:, head * tiny.d_head : (head + 1) * tiny.d_head]
    return own * scale_of(block, 1)[:, None]


def neuron_weight(tiny: Tiny, module, layer: int) -> Tensor:
    block = blocks(tiny, module)[layer]
    last = next(getattr(block.mlp, name) for name in ("fc2", "down_proj") if hasattr(block.mlp, name))
    return last.weight * scale_of(block, 2)[:, None]


def scale_of(block, number: int) -> Tensor:
    for path in (f"ls{number}.gamma", f"layer_scale{number}.lambda1"):
        module, name = path.split(".")
        found = getattr(getattr(block, module, None), name, None)
        if found is not None:
            return found
    return torch.ones(1)


def test_whole_numbers_by_hand() -> None:
    module, images = integer_vit(), integer_images()["base"]
    result = logit_attribution(vmi.wrap(module), images, answer=0, progress=False)
    rows = result.table
    found = {(p, -1 if str(r) == "<NA>" else int(r)): c for p, r, c in zip(rows["part"], rows["layer"], rows["contribution"], strict=True) if p in ("embed", "attn_out", "mlp_out", "constant")}
    # A, B, C are 1, 2, 3: logit 0 = A + 5 A + (B + 3 A) + (C + 2 B).
    assert found == {
        ("embed", -1): 1, ("attn_out", 0): 0, ("mlp_out", 0): 0, ("attn_out", 1): 10, ("mlp_out", 1): 7, ("constant", -1): 0,
    }  # fmt: skip
    heads = rows[(rows["part"] == "head") & (rows["layer"] == 1)]["contribution"]
    assert heads.tolist() == [5, 5]
    # Head 1.0 reads A everywhere, head 1.1 reads channel B (0, 0, 2, 2 or 2, 2, 1, 3) plus 3 A.
    sources = rows[(rows["kind"] == "source") & (rows["layer"] == 1)]["contribution"]
    tokens = images[0, 1].flatten()
    assert sources.tolist() == [(5 + float(b) + 3) / 4 for b in tokens]
    neurons = rows[(rows["kind"] == "neuron") & (rows["layer"] == 1)].set_index("neuron")["contribution"]
    assert neurons[0] == 7
    other = logit_attribution(vmi.wrap(module), images, answer=1, against=0, parts=(), progress=False)
    assert other.table["contribution"].sum() == 7 - 18


def siglip() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    module = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, class_token=False, global_pool="map", num_classes=5
    )
    return stirred(module).eval()


def test_readouts_that_are_not_linear_are_refused_with_what_runs_there() -> None:
    vit = vmi.wrap(siglip())
    with pytest.raises(SpecError, match=r"not linear in its last residual stream.*LayerNorm, Linear.*use logit_lens"):
        logit_attribution(vit, TIMM_PLAIN.images(2), progress=False)
    hooks = [len(module._forward_hooks) for module in vit.module.modules()]
    assert not any(hooks)


def test_a_readout_of_another_layer_is_refused() -> None:
    module = TIMM_PLAIN.module()

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return module.fc_norm(x)

    kept: list[Tensor] = []
    module.blocks[0].register_forward_hook(lambda *given: kept.append(given[2]))
    module.head.register_forward_hook(lambda own, given, output: output + kept[-1][:, 0, :5])
    vit = vmi.wrap(module)
    with pytest.raises(SpecError, match=r"or reads something else"):
        linear_readout(vit, TIMM_PLAIN.images(2), lambda outputs: outputs[:, 0])


def test_bad_input_is_named_first() -> None:
    vit, images = vmi.wrap(TIMM_PLAIN.module()), TIMM_PLAIN.images(2)
    with pytest.raises(SpecError, match=r"class 7 of example 0 is out of range; the model has classes 0 to 4"):
        logit_attribution(vit, images, answer=7)
    with pytest.raises(SpecError, match=r"There is no part 'haeds'. Close matches: heads"):
        logit_attribution(vit, images, parts=["haeds"])
    with pytest.raises(SpecError, match=r"example=2 is out of range; there are 2 images"):
        logit_attribution(vit, images, example=2)
    clip = vmi.wrap(HF_CLIP.module())
    with pytest.raises(SpecError, match=r"this model gives 6 features \(image_embeds\). Give directions \[class, 6\]"):
        logit_attribution(clip, images)
    with pytest.raises(SpecError, match=r"directions has shape \(4, 5\)"):
        logit_attribution(clip, images, directions=torch.randn(4, 5))
    with pytest.raises(SpecError, match=r"3 names are given for 5 classes"):
        logit_attribution(vit, images, names=["a", "b", "c"])


@pytest.mark.parametrize(
    "name",
    [
        "deit_base_distilled_patch16_224",  # two heads read two tokens
        "vit_medium_patch16_gap_256",  # mean pooling, a norm before and none behind it
        "eva02_base_patch14_224",  # a norm behind the pooling, gated MLPs with a norm inside
        "vit_relpos_base_patch16_rpn_224",  # norms behind attention and MLP
        "vit_base_patch16_xp_224",  # attention and MLP side by side
        "vit_dpwee_patch16_reg1_gap_256",  # differential attention, side by side
    ],
)
def test_parts_sum_to_the_logit_in_other_families(name: str) -> None:
    from tests.zoo.shrink import names, shrunk

    if name not in names():
        pytest.skip("this timm does not have it")
    vit = vmi.wrap(stirred(shrunk(name)).eval())
    images = torch.randn(2, *vit.layout.tokens.input_shape)
    result = logit_attribution(vit, images, answer=1, progress=False)
    components = result.table[result.table["kind"] == "component"]["contribution"]
    with torch.no_grad():
        logit = float(vit(images)[:, 1].mean())
    assert np.isclose(components.sum(), logit, atol=1e-4 * max(1.0, float(components.abs().sum())))
    assert result.provenance["residual"] < 1e-5
    for layer, rows in result.table[result.table["kind"] == "head"].groupby("layer"):
        whole = result.table[(result.table["part"] == "attn_out") & (result.table["layer"] == layer)]
        assert np.isclose(rows["contribution"].sum(), whole["contribution"].item(), atol=1e-5)
    for layer, rows in result.table[result.table["kind"] == "source"].groupby("layer"):
        heads = result.table[(result.table["part"] == "head") & (result.table["layer"] == layer)]
        assert np.isclose(rows["contribution"].sum(), heads["contribution"].sum(), atol=1e-4)
