"""A checkpoint of two towers loads as its vision tower, with the weights and the output of the original's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vit_mechinterp as vmi

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
# By class: what its configuration has beside the two towers'.
MODELS: dict[str, dict[str, Any]] = {
    "CLIPModel": {"projection_dim": 20},
    "MetaClip2Model": {"projection_dim": 20},
    "ChineseCLIPModel": {"projection_dim": 20},
    "AltCLIPModel": {"projection_dim": 20, "text": {"project_dim": 20}},
    "CLIPSegModel": {"projection_dim": 20},
    "SiglipModel": {},
    "OwlViTModel": {"projection_dim": 20},
    "Owlv2Model": {"projection_dim": 20},
    "Aimv2Model": {"projection_dim": 20},
    "BlipModel": {"projection_dim": 20},
}


def whole(name: str) -> nn.Module:
    """The tiny model of two towers, no two parameters alike."""
    options = dict(MODELS[name])
    text = {**TEXT, **options.pop("text", {})}
    config = getattr(transformers, name.replace("Model", "Config"))
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(vision_config=VISION, text_config=text, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def features(model: Any, x: Tensor) -> Tensor:
    """The last hidden state of the original's vision tower, by its own path."""
    return model.vision_model(x).last_hidden_state


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_vision_tower_has_the_original_s_weights(name: str, tmp_path: Path) -> None:
    model = whole(name)
    model.save_pretrained(tmp_path)
    vit = vmi.load(f"hf/{tmp_path}")
    assert isinstance(vit.module, nn.Module)
    assert type(vit.module).__module__.startswith("transformers.models.")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    inner = getattr(vit.module, "vision_model", vit.module)
    wanted = features(model, x)
    assert torch.equal(inner(x).last_hidden_state, wanted)
    last = f"blocks.{vit.layout.n_layers - 1}.resid_post"
    output, cache = vit.run(x, capture=[last])
    assert cache[last].shape == (2, vit.layout.tokens.n_tokens, 32)
    assert float(output.abs().max()) > 0
    theirs, ours = dict(model.named_parameters()), dict(inner.named_parameters())
    shared = {key for key in ours if f"vision_model.{key}" in theirs}
    assert len(shared) > 20
    assert all(torch.equal(ours[key], theirs[f"vision_model.{key}"]) for key in shared)
    assert not any("text" in key for key, _ in vit.module.named_parameters())


@torch.no_grad()
def test_the_projection_comes_along_where_there_is_one(tmp_path: Path) -> None:
    model = whole("CLIPModel")
    model.save_pretrained(tmp_path)
    vit = vmi.load(f"hf/{tmp_path}")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pooled = model.vision_model(x).pooler_output
    assert vit.layout.output == "image_embeds"
    assert torch.equal(vit(x), model.visual_projection(pooled))
