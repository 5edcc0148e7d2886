"""Vision towers are loaded out of checkpoints that hold more: language models, text towers, decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vit_mechinterp as vmi
from vit_mechinterp.errors import UnsupportedModelError

STACK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
VISION = {**STACK, "image_size": 16, "patch_size": 8}
TEXT = {**STACK, "vocab_size": 64}
QWEN_TEXT = {
    **TEXT,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
}
QWEN_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
OPT = {**STACK, "model_type": "opt", "ffn_dim": 32, "vocab_size": 64, "word_embed_proj_dim": 32}
WHOLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "Qwen2VLForConditionalGeneration": (
        "Qwen2VLConfig",
        {"text_config": QWEN_TEXT, "vision_config": {**QWEN_VISION, "image_size": 16}},
        "model.visual",
    ),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
        },
        "model.vision_tower",
    ),
    "AltCLIPModel": (
        "AltCLIPConfig",
        {"text_config": {**TEXT, "project_dim": 16}, "vision_config": VISION, "projection_dim": 16},
        "vision_model",
    ),
    "Aimv2Model": (
        "Aimv2Config",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
        "vision_model",
    ),
    "BlipForConditionalGeneration": (
        "BlipConfig",
        {"text_config": TEXT, "vision_config": VISION},
        "vision_model",
    ),
    "Blip2ForConditionalGeneration": (
        "Blip2Config",
        {
            "vision_config": VISION,
            "qformer_config": {**TEXT, "encoder_hidden_size": 32},
            "text_config": OPT,
        },
        "vision_model",
    ),
    "GitModel": ("GitConfig", {"vision_config": VISION, **TEXT}, "image_encoder"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_tower_out_of_a_whole_checkpoint(name: str, tmp_path: Path) -> None:
    config, options, path = WHOLE[name]
    torch.manual_seed(0)
    whole = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    whole.save_pretrained(tmp_path)
    vit = vmi.load(f"hf/{tmp_path}")
    native = vmi.wrap(whole.get_submodule(path))
    images = torch.randn(2, *native.layout.tokens.input_shape)
    assert vit.layout.tokens == native.layout.tokens
    with torch.no_grad():
        assert torch.equal(vit(images), native(images))
    assert type(vit.module) is type(native.module)
    assert sum(p.numel() for p in vit.module.parameters()) < sum(p.numel() for p in whole.parameters())
    random = vmi.load(f"hf/{tmp_path}", pretrained=False)
    assert type(random.module) is type(native.module)
    assert not torch.equal(random(images), native(images))


def test_a_checkpoint_without_a_tower(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"BertModel\. Probed:"):
        vmi.load(f"hf/{tmp_path}")
    with pytest.raises(UnsupportedModelError, match=r"BertModel\. Probed:"):
        vmi.load(f"hf/{tmp_path}", pretrained=False)
