"""Tiny vision towers of vision-language models, most of which pack all images of a batch into one sequence.

The image size is an attribute that their configurations do not declare, and it is what a tower is laid out for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

Build = Callable[[], nn.Module]

WIDE = {"image_size": [16, 24], "patch_size": 4}
QWEN = {"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 40, **WIDE}
WINDOWS = {**QWEN, "window_size": 16, "fullatt_block_indexes": [1]}
LEARNED = {**QWEN, "num_position_embeddings": 16}
DEEP = {**LEARNED, "deepstack_visual_indexes": [1]}
GLM = {**QWEN, "image_size": 16}
CLIP = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    **WIDE,
}
MUSE = {
    **CLIP,
    "pos_emb_height": 3,
    "pos_emb_width": 3,
    "max_position_embeddings": 9,
    "layer_types": ["window_attention", "full_attention", "window_attention"],
}


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def _tower(package: str, name: str, config: str, **options: Any) -> dict[str, Build]:
    def build() -> nn.Module:
        configurations = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
        models = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        return getattr(models, name)(getattr(configurations, config)(**options))

    return {name: build}


PACKED: dict[str, Build] = {
    **_tower(
        "qwen2_vl",
        "Qwen2VisionTransformerPretrainedModel",
        "Qwen2VLVisionConfig",
        **{**_without(QWEN, "out_hidden_size", "intermediate_size"), "embed_dim": 32, "hidden_size": 40},
        mlp_ratio=2,
    ),
    **_tower(
        "qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig", **WINDOWS
    ),
    **_tower("qwen2_5_omni", "Qwen2_5OmniVisionEncoder", "Qwen2_5OmniVisionEncoderConfig", **WINDOWS),
    **_tower(
        "exaone4_5", "Exaone4_5_VisionModel", "Exaone4_5_VisionConfig", **WINDOWS, num_key_value_heads=2
    ),
    **_tower("qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionConfig", **DEEP),
    **_tower("qwen3_vl_moe", "Qwen3VLMoeVisionModel", "Qwen3VLMoeVisionConfig", **DEEP),
    **_tower("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", "Qwen3OmniMoeVisionEncoderConfig", **DEEP),
    **_tower("cohere_compass", "CohereCompassVisionModel", "CohereCompassVisionConfig", **DEEP),
    **_tower("qwen3_5", "Qwen3_5VisionModel", "Qwen3_5VisionConfig", **LEARNED),
    **_tower("qwen3_5_moe", "Qwen3_5MoeVisionModel", "Qwen3_5MoeVisionConfig", **LEARNED),
    **_tower("qwen4_exp", "Qwen4ExpVisionModel", "Qwen4ExpVisionConfig", **LEARNED),
    **_tower("glm4v", "Glm4vVisionModel", "Glm4vVisionConfig", **GLM),
    **_tower("glm4v_moe", "Glm4vMoeVisionModel", "Glm4vMoeVisionConfig", **GLM),
    **_tower("glm_ocr", "GlmOcrVisionModel", "GlmOcrVisionConfig", **GLM),
    **_tower("glm5_next", "Glm5NextVisionModel", "Glm5NextVisionConfig", **GLM),
    **_tower("glm_image", "GlmImageVisionModel", "GlmImageVisionConfig", **_without(GLM, "out_hidden_size")),
    **_tower(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        "Ernie4_5_VLMoeVisionConfig",
        **_without(QWEN, "out_hidden_size"),
    ),
    **_tower(
        "dots3_note",
        "Dots3NoteVisionModel",
        "Dots3NoteVisionConfig",
        **CLIP,
        mlp_layer_types=["dense", "sparse", "dense"],
        moe_intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        router_scaling_factor=1.0,
        adapter_in_dim=32,
        adapter_out_dim=40,
    ),
    **_tower(
        "kimi_k25", "Kimi_K25VisionModel", "Kimi_K25VisionConfig", **CLIP, pos_emb_height=4, pos_emb_width=4
    ),
    **_tower("muse_glimmer", "MuseGlimmerVisionModel", "MuseGlimmerVisionConfig", **MUSE),
    **_tower("muse_spark", "MuseSparkVisionModel", "MuseSparkVisionConfig", **MUSE),
    **_tower(
        "paddleocr_vl", "PaddleOCRVisionModel", "PaddleOCRVisionConfig", **{**CLIP, "image_size": 16}
    ),
    **_tower("video_llama_3", "VideoLlama3VisionModel", "VideoLlama3VisionConfig", **CLIP),
    **_tower(
        "minimax_m3_vl", "MiniMaxM3VLVisionModel", "MiniMaxM3VLVisionConfig", **{**CLIP, "image_size": 16}
    ),
    **_tower("cosmos3_edge", "Cosmos3EdgeVisionModel", "Cosmos3EdgeVisionConfig", **CLIP, num_patches=16),
    **_tower(
        "hunyuan_vl",
        "HunYuanVLVisionTransformer",
        "HunYuanVLVisionConfig",
        **CLIP,
        max_image_size=16,
        text_hidden_size=40,
    ),
    **_tower(
        "inkling2",
        "Inkling2VisionModel",
        "Inkling2VisionConfig",
        **CLIP,
        posemb_grid_size=4,
        projection_hidden_dim=48,
        text_hidden_size=40,
    ),
}


PATCHES: dict[str, Build] = {
    **_tower(
        "molmo2", "Molmo2VisionModel", "Molmo2VisionConfig", **CLIP, num_key_value_heads=4, head_dim=8
    ),
    **_tower(
        "granite_docling",
        "GraniteDoclingVisionModel",
        "GraniteDoclingVisionConfig",
        **{**CLIP, "image_size": 16},
        deepstack_visual_indexes=[0],
        out_hidden_size=40,
    ),
    **_tower(
        "gemma4",
        "Gemma4VisionModel",
        "Gemma4VisionConfig",
        **CLIP,
        num_key_value_heads=2,
        head_dim=8,
        position_embedding_size=16,
        pooling_kernel_size=2,
    ),
    **_tower(
        "kosmos2_5",
        "Kosmos2_5VisionModel",
        "Kosmos2_5VisionConfig",
        **_without(CLIP, "patch_size"),
        head_dim=8,
        patch_embed_hidden_size=48,
        max_num_patches=24,
    ),
    **_tower(
        "pix2struct",
        "Pix2StructVisionModel",
        "Pix2StructVisionConfig",
        **_without(CLIP, "patch_size", "intermediate_size"),
        d_kv=8,
        d_ff=48,
        patch_embed_hidden_size=48,
        seq_len=24,
        initializer_range=0.02,
    ),
}
"""These see images as rows, but take patches that are cut out and numbered, or merge them at the end."""
