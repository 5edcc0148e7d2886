"""Converted ViTs: attention that no token can move, values that tokens still make, and encodings found or refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

import vit_mechinterp as vmi
from tests.tiny_models import stirred
from vit_mechinterp.errors import UnsupportedModelError
from vit_mechinterp.model import check, positional_attention
from vit_mechinterp.model.encodings import encoding_table, patch_encodings

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}


def of_timm(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return stirred(VisionTransformer(**(SIZES | options))).eval()


def of_transformers() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3
    )
    torch.manual_seed(0)
    return stirred(transformers.ViTForImageClassification(config)).eval()


@pytest.mark.parametrize("build", [of_timm, of_transformers])
def test_a_converted_vit_conforms_and_its_attention_is_positional(build: object) -> None:
    module = build()  # type: ignore[operator]
    before = copy.deepcopy(module.state_dict())
    converted = positional_attention(module)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    vit = vmi.wrap(converted)
    report = check(vit, progress=False)
    assert report.passed, str(report)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    sites = ["blocks.*.attn.pattern", "blocks.*.attn.v"]
    _, cache = vit.run(images, capture=sites)
    _, ordinary = vmi.wrap(module).run(images, capture=sites)
    for layer in range(2):
        pattern, v = cache[f"blocks.{layer}.attn.pattern"], cache[f"blocks.{layer}.attn.v"]
        torch.testing.assert_close(pattern[1:], pattern[:1].expand(2, -1, -1, -1), rtol=0, atol=0)
        assert pattern.std(dim=-1).min() > 1e-3
        assert (v[1] - v[0]).abs().max() > 0.1
        assert (ordinary[f"blocks.{layer}.attn.pattern"][1] - pattern[0]).abs().max() > 1e-2
    # Values of the first block are the ordinary model's own.
    torch.testing.assert_close(cache["blocks.0.attn.v"], ordinary["blocks.0.attn.v"], rtol=1e-5, atol=1e-6)


def test_the_pattern_is_the_formula_written_out() -> None:
    module = of_timm()
    _, cache = vmi.wrap(positional_attention(module)).run(torch.zeros(1, 3, 16, 16), capture=["blocks.1.attn.pattern"])
    p = F.layer_norm(module.pos_embed[0], (24,))  # type: ignore[index]
    qkv = module.blocks[1].attn.qkv(p).reshape(5, 3, 2, 12)  # type: ignore[index, union-attr]
    scores = torch.einsum("qhd,khd->hqk", qkv[:, 0], qkv[:, 1]) / 12**0.5
    torch.testing.assert_close(cache["blocks.1.attn.pattern"][0], scores.softmax(-1), rtol=1e-4, atol=1e-6)


def test_the_encodings_stay_tied_and_learn_through_attention() -> None:
    converted = positional_attention(of_timm())
    tables = {id(parameter) for name, parameter in converted.named_parameters(remove_duplicate=False) if name.endswith((".table", "pos_embed"))}
    assert len(tables) == 1
    pattern = vmi.wrap(converted).run(torch.zeros(1, 3, 16, 16), capture=["blocks.1.attn.pattern"])[1]["blocks.1.attn.pattern"]
    (gradient,) = torch.autograd.grad(pattern[0, 0, 1, 2], converted.pos_embed)
    assert gradient.abs().max() > 1e-4
    assert vmi.wrap(converted).fingerprint() != vmi.wrap(of_timm()).fingerprint()


def test_tables_are_those_of_the_module() -> None:
    module = of_timm()
    torch.testing.assert_close(encoding_table(vmi.wrap(module)), module.pos_embed[0], rtol=0, atol=0)  # type: ignore[index]
    torch.testing.assert_close(patch_encodings(vmi.wrap(module)), module.pos_embed[0, 1:], rtol=0, atol=0)  # type: ignore[index]
    other = of_transformers()
    wanted = other.vit.embeddings.position_embeddings[0, 1:]  # type: ignore[union-attr, index]
    torch.testing.assert_close(patch_encodings(vmi.wrap(other)), wanted, rtol=0, atol=0)
    patches_alone = of_timm(no_embed_class=True)
    assert len(patch_encodings(vmi.wrap(patches_alone))) == 4
    with pytest.raises(UnsupportedModelError, match=r"4 positional encodings for 5 tokens, and none for some .* \(cls\)"):
        positional_attention(patches_alone)


def test_registers_come_without_encodings() -> None:
    config = transformers.Dinov2WithRegistersConfig(
        image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, num_register_tokens=2
    )
    module = stirred(transformers.Dinov2WithRegistersModel(config)).eval()
    wanted = module.embeddings.position_embeddings[0, 1:]  # type: ignore[union-attr, index]
    torch.testing.assert_close(patch_encodings(vmi.wrap(module)), wanted, rtol=0, atol=0)
    with pytest.raises(UnsupportedModelError, match=r"5 positional encodings for 7 tokens.*\(cls, registers\)"):
        positional_attention(module)


@pytest.mark.parametrize("positional", [False, True])
def test_moving_patches_with_their_encodings_changes_nothing(positional: bool) -> None:
    """A ViT knows places by their encodings alone; its attention moves along, and the answer stays."""
    order = torch.randperm(4, generator=torch.Generator().manual_seed(2))
    one, other = of_timm(), of_timm()
    with torch.no_grad():
        other.pos_embed[0, 1:] = one.pos_embed[0, 1:][order]  # type: ignore[index]
    if positional:
        one, other = positional_attention(one), positional_attention(other)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    patches = images.reshape(2, 3, 2, 8, 2, 8).permute(0, 2, 4, 1, 3, 5).reshape(2, 4, 3, 8, 8)
    moved = patches[:, order].reshape(2, 2, 2, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 16)
    site = "blocks.1.attn.pattern"
    logits, cache = vmi.wrap(one).run(images, capture=[site])
    same, there = vmi.wrap(other).run(moved, capture=[site])
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-5)
    places = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    torch.testing.assert_close(there[site], cache[site][:, :, places][..., places], rtol=1e-4, atol=1e-5)
    # Moving the patches alone does change it.
    assert (one(moved) - logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["vit_base_patch16_rope_224", "beit_base_patch16_224"])
def test_rotary_and_relative_positions_are_refused_with_the_reason(name: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match="Rotary and relative positions act inside attention"):
        patch_encodings(vmi.wrap(module))


def test_other_projections_are_refused() -> None:
    with torch.device("meta"):
        module = timm.create_model("eva02_tiny_patch14_224")
    with pytest.raises(UnsupportedModelError, match="neither a packed projection qkv"):
        positional_attention(module)
