"""Every transformers architecture that is covered, tiny: the real class from its configuration, random weights.

Three blocks of width 24 to 48; every option that makes a family different is on. Grids are not square where the
family allows it, so that rows and columns cannot be mistaken for each other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.zoo.packed_models import PACKED, PATCHES

Build = Callable[[], nn.Module]

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
WIDE = {"image_size": (16, 24), "patch_size": 8}
SQUARE = {"image_size": 16, "patch_size": 8}


def _of(package: str, name: str, config: str, **options: Any) -> Build:
    def build() -> nn.Module:
        module = importlib.import_module(f"transformers.models.{package}")
        made = getattr(module, config)(**options)
        return getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)(
            made
        )

    return build


def _row(package: str, names: str, config: str, **options: Any) -> dict[str, Build]:
    return {name: _of(package, name, config, **options) for name in names.split()}


def _nested(package: str, names: str, config: str, **vision: Any) -> dict[str, Build]:
    return {name: _of(package, name, config, vision_config=vision) for name in names.split()}


VIT = {**TINY, **WIDE}
PLAIN = {**TINY, **SQUARE}
PAIRS = {**TINY, "image_size": (16, 16), "patch_size": (8, 8)}
CLIP = {**TINY, **SQUARE, "projection_dim": 20}
BEIT = {**TINY, "image_size": 16, "patch_size": 8, "layer_scale_init_value": 0.3}
SAM = {
    **TINY,
    "mlp_dim": 48,
    "image_size": 32,
    "patch_size": 8,
    "output_channels": 12,
    "window_size": 3,
    "global_attn_indexes": [1],
}
BERT = {**TINY, "image_size": (16, 24), "patch_size": 8}

BUILDERS: dict[str, Build] = {
    **_row("vit", "ViTModel ViTForImageClassification", "ViTConfig", **VIT, num_labels=5),
    **_row(
        "deit",
        "DeiTModel DeiTForImageClassification DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        **VIT,
        num_labels=5,
    ),
    **_row("vit_msn", "ViTMSNModel ViTMSNForImageClassification", "ViTMSNConfig", **VIT, num_labels=5),
    **_row("vit_mae", "ViTMAEModel", "ViTMAEConfig", **VIT, mask_ratio=0.0),
    **_row("ijepa", "IJepaModel IJepaForImageClassification", "IJepaConfig", **VIT, num_labels=5),
    **_row("pixio", "PixioModel", "PixioConfig", **PLAIN, n_cls_tokens=3),
    **_row(
        "vivit",
        "VivitModel VivitForVideoClassification",
        "VivitConfig",
        **TINY,
        image_size=16,
        num_frames=4,
        tubelet_size=[2, 8, 8],
        num_labels=5,
    ),
    **_row(
        "beit",
        "BeitModel BeitForImageClassification",
        "BeitConfig",
        **BEIT,
        use_relative_position_bias=True,
        use_mean_pooling=False,
        num_labels=5,
    ),
    "BeitModel shared bias, mean pooling": _of(
        "beit",
        "BeitModel",
        "BeitConfig",
        **BEIT,
        use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=True,
    ),
    **_row(
        "yolos",
        "YolosModel YolosForObjectDetection",
        "YolosConfig",
        **{**BERT, "image_size": [16, 24]},
        num_detection_tokens=3,
    ),
    **_row("dpt", "DPTModel", "DPTConfig", **TINY, **SQUARE, is_hybrid=False, backbone_out_indices=[0, 1, 2]),
    **_row(
        "videomae",
        "VideoMAEModel VideoMAEForVideoClassification",
        "VideoMAEConfig",
        **BERT,
        num_frames=4,
        tubelet_size=2,
        num_labels=5,
    ),
    **_row("dinov2", "Dinov2Model Dinov2ForImageClassification", "Dinov2Config", **PLAIN, num_labels=5),
    "Dinov2Model gated": _of("dinov2", "Dinov2Model", "Dinov2Config", **PLAIN, use_swiglu_ffn=True),
    **_row(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        **PLAIN,
        num_labels=5,
    ),
    **_row("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", **VIT, num_register_tokens=2),
    "DINOv3ViTModel gated": _of("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", **VIT, use_gated_mlp=True),
    **_row("tipsv2", "Tipsv2VisionModel", "Tipsv2VisionConfig", **PLAIN),
    **_row("radio", "RadioModel", "RadioConfig", **TINY, **SQUARE, max_img_size=32),
    **_row(
        "sapiens2",
        "Sapiens2Model",
        "Sapiens2Config",
        **VIT,
        num_register_tokens=2,
        num_key_value_heads_per_layer=[4, 2, 4],
    ),
    **_row(
        "eomt",
        "EomtForUniversalSegmentation",
        "EomtConfig",
        **TINY,
        **SQUARE,
        num_blocks=1,
        num_queries=5,
        num_upscale_blocks=1,
    ),
    **_row("clip", "CLIPVisionModel CLIPVisionModelWithProjection", "CLIPVisionConfig", **CLIP),
    **_nested("clip", "CLIPForImageClassification", "CLIPConfig", **CLIP),
    **_row(
        "metaclip_2",
        "MetaClip2VisionModel MetaClip2VisionModelWithProjection",
        "MetaClip2VisionConfig",
        **CLIP,
    ),
    **_row("altclip", "AltCLIPVisionModel", "AltCLIPVisionConfig", **CLIP),
    **_row("chinese_clip", "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", **CLIP),
    **_row("clipseg", "CLIPSegVisionModel", "CLIPSegVisionConfig", **CLIP),
    **_row("mlcd", "MLCDVisionModel", "MLCDVisionConfig", **CLIP),
    **_row("owlvit", "OwlViTVisionModel", "OwlViTVisionConfig", **CLIP),
    **_row("owlv2", "Owlv2VisionModel", "Owlv2VisionConfig", **CLIP),
    **_row("kosmos2", "Kosmos2VisionModel", "Kosmos2VisionConfig", **CLIP),
    **_row("git", "GitVisionModel", "GitVisionConfig", **CLIP),
    **_row("siglip", "SiglipVisionModel", "SiglipVisionConfig", **CLIP),
    **_nested("siglip", "SiglipForImageClassification", "SiglipConfig", **CLIP),
    **_row("siglip2", "Siglip2VisionModel", "Siglip2VisionConfig", **TINY, patch_size=8, num_patches=9),
    **_nested(
        "siglip2", "Siglip2ForImageClassification", "Siglip2Config", **TINY, patch_size=8, num_patches=9
    ),
    **_row("idefics2", "Idefics2VisionTransformer", "Idefics2VisionConfig", **CLIP),
    **_row("idefics3", "Idefics3VisionTransformer", "Idefics3VisionConfig", **CLIP),
    **_row("smolvlm", "SmolVLMVisionTransformer", "SmolVLMVisionConfig", **CLIP),
    **_row("janus", "JanusVisionModel", "JanusVisionConfig", **TINY, **SQUARE),
    **_row("blip", "BlipVisionModel", "BlipVisionConfig", **CLIP),
    **_row("blip_2", "Blip2VisionModel", "Blip2VisionConfig", **CLIP),
    **_row("instructblip", "InstructBlipVisionModel", "InstructBlipVisionConfig", **CLIP),
    **_row("instructblipvideo", "InstructBlipVideoVisionModel", "InstructBlipVideoVisionConfig", **CLIP),
    **_row(
        "internvl",
        "InternVLVisionModel",
        "InternVLVisionConfig",
        **PAIRS,
        use_qk_norm=True,
        use_mean_pooling=False,
        layer_scale_init_value=0.3,
    ),
    **_row(
        "qianfan_ocr", "QianfanOCRVisionModel", "QianfanOCRVisionConfig", **PAIRS, layer_scale_init_value=0.3
    ),
    **_row("aimv2", "Aimv2VisionModel", "Aimv2VisionConfig", **CLIP),
    **_row("ovis2", "Ovis2VisionModel", "Ovis2VisionConfig", **CLIP),
    **_row("pixtral", "PixtralVisionModel", "PixtralVisionConfig", **TINY, **SQUARE),
    **_row(
        "sam",
        "SamVisionModel",
        "SamVisionConfig",
        **{**TINY, "mlp_dim": 48},
        image_size=32,
        patch_size=8,
        output_channels=12,
        window_size=3,
        global_attn_indexes=[1],
    ),
    **_row(
        "sam_hq",
        "SamHQVisionModel",
        "SamHQVisionConfig",
        **{**TINY, "mlp_dim": 48},
        image_size=32,
        patch_size=8,
        output_channels=12,
        window_size=3,
        global_attn_indexes=[1],
    ),
    **_row("got_ocr2", "GotOcr2VisionEncoder", "GotOcr2VisionConfig", **SAM),
    **_row(
        "deepseek_ocr2",
        "DeepseekOcr2SamVisionEncoder",
        "DeepseekOcr2SamVisionConfig",
        **SAM,
        downsample_channels=[12, 12],
    ),
    **_row(
        "unlimited_ocr",
        "UnlimitedOcrSamVisionEncoder",
        "UnlimitedOcrSamVisionConfig",
        **SAM,
        downsample_channels=[12, 12],
    ),
    **_row(
        "pp_formulanet",
        "PPFormulaNetVisionModel",
        "PPFormulaNetVisionConfig",
        **SAM,
        post_conv_in_channels=12,
        post_conv_mid_channels=12,
        post_conv_out_channels=12,
    ),
    **_row("slanext", "SLANeXtVisionEncoder", "SLANeXtVisionConfig", **SAM),
    **_row("flava", "FlavaImageModel", "FlavaImageConfig", **TINY, **SQUARE),
    **_row("phi4_multimodal", "Phi4MultimodalVisionModel", "Phi4MultimodalVisionConfig", **TINY, **SQUARE),
    **_row(
        "eomt_dinov3",
        "EomtDinov3ForUniversalSegmentation",
        "EomtDinov3Config",
        **TINY,
        **SQUARE,
        num_blocks=1,
        num_queries=5,
        num_upscale_blocks=1,
    ),
    **_row(
        "sam3",
        "Sam3ViTModel",
        "Sam3ViTConfig",
        **TINY,
        image_size=32,
        pretrain_image_size=16,
        patch_size=8,
        window_size=2,
        global_attn_indexes=[1],
    ),
    **_row(
        "mgp_str",
        "MgpstrModel",
        "MgpstrConfig",
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=2.0,
        image_size=[16, 24],
        patch_size=8,
    ),
    **_row(
        "llama4",
        "Llama4VisionModel",
        "Llama4VisionConfig",
        **{**TINY, "intermediate_size": 128},
        **SQUARE,
        vision_output_dim=32,
        projector_input_dim=32,
        projector_output_dim=32,
    ),
    **_row("step3p7", "Step3p7VisionModel", "Step3p7VisionConfig", **TINY, **SQUARE),
    **_row(
        "vjepa2",
        "VJEPA2Model VJEPA2ForVideoClassification",
        "VJEPA2Config",
        **{k: v for k, v in TINY.items() if k != "intermediate_size"},
        patch_size=8,
        crop_size=16,
        frames_per_clip=4,
        tubelet_size=2,
        pred_hidden_size=32,
        pred_num_attention_heads=4,
        pred_num_hidden_layers=1,
        num_pooler_layers=1,
        num_labels=5,
    ),
}


def _data2vec(name: str) -> Build:
    def build() -> nn.Module:
        import transformers

        config = transformers.Data2VecVisionConfig(
            **BEIT, use_relative_position_bias=True, use_mean_pooling=False, num_labels=5
        )
        return getattr(transformers, name)(config)

    return build


def _vitpose() -> nn.Module:
    import transformers

    backbone = transformers.VitPoseBackboneConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=[16, 24],
        patch_size=[8, 8],
        out_indices=[3],
    )
    return transformers.VitPoseForPoseEstimation(
        transformers.VitPoseConfig(backbone_config=backbone, num_labels=3, use_simple_decoder=True)
    )


def _timm_wrapper(name: str) -> Build:
    def build() -> nn.Module:
        import transformers

        options = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
        config = transformers.TimmWrapperConfig(
            architecture="vit_tiny_patch16_224", num_labels=5, model_args=options
        )
        return getattr(transformers, name)(config)

    return build


BUILDERS |= PACKED | PATCHES | {
    "Data2VecVisionModel": _data2vec("Data2VecVisionModel"),
    "Data2VecVisionForImageClassification": _data2vec("Data2VecVisionForImageClassification"),
    "VitPoseForPoseEstimation": _vitpose,
    "TimmWrapperModel": _timm_wrapper("TimmWrapperModel"),
    "TimmWrapperForImageClassification": _timm_wrapper("TimmWrapperForImageClassification"),
}


def build(name: str) -> nn.Module:
    """A tiny model of a class, in eval mode, its weights random and none of them zero."""
    return build_from(BUILDERS[name])


def build_from(builder: Build) -> nn.Module:
    """The same for any builder."""
    torch.manual_seed(0)
    module = builder()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()
