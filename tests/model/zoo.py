"""Small models of every family variant, and neighbours that look alike and compute something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import timm.layers
import torch
import transformers
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from tests.tiny_models import stirred

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


@dataclass(frozen=True)
class Variant:
    """A recipe for one model, and what is true of it; ``absent`` are global sites that it lacks."""

    name: str
    build: Callable[[], nn.Module]
    prefix: tuple[str, ...] = ("cls",)
    output: str = "logits"
    absent: tuple[str, ...] = ()
    gated: bool = False
    grid: tuple[int, int] = (4, 4)

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return stirred(self.build()).eval().to(dtype)

    def __str__(self) -> str:
        return self.name


class GatedAttention(Attention):
    """timm's attention with a gate between z and the output projection, which no registered name has."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "gated": True})


class GatedBlock(Block):
    """timm's block with a parameter that no row knows."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = nn.Parameter(torch.ones(1))


def named(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A timm model by its name, made small."""
    return lambda: timm.create_model(name, **{**SMALL, **options})


def plain(**options: Any) -> Callable[[], nn.Module]:
    """timm's VisionTransformer with a 4 x 4 grid."""
    return lambda: VisionTransformer(**{**SMALL, "img_size": 32, "patch_size": 8, **options})


REGISTERS = ("registers",) * 4
TIMM = (
    Variant("vit", named("vit_base_patch16_224", img_size=64)),
    Variant("vit-augreg", named("vit_tiny_patch16_224", img_size=64, drop_rate=0.1, drop_path_rate=0.1)),
    Variant("vit-rectangular", plain(img_size=(24, 40)), grid=(3, 5)),
    Variant("vit-without-biases", plain(qkv_bias=False, proj_bias=False)),
    Variant("deit", named("deit_tiny_patch16_224", img_size=64)),
    Variant(
        "deit-distilled",
        named("deit_tiny_distilled_patch16_224", img_size=64),
        ("cls", "distillation"),
        absent=("pooled",),
    ),
    Variant("deit3", named("deit3_small_patch16_224", img_size=64)),
    Variant("mae", plain(global_pool="avg"), absent=("ln_final",)),
    Variant("dino", plain(num_classes=0), output="pooled", absent=("logits",)),
    Variant(
        "unpooled",
        plain(num_classes=0, global_pool=""),
        output="last_hidden_state",
        absent=("pooled", "logits"),
    ),
    Variant("clip", named("vit_base_patch16_clip_quickgelu_224", img_size=64)),
    Variant("siglip", named("vit_base_patch16_siglip_224", img_size=64), ()),
    Variant("dinov2", named("vit_small_patch14_dinov2", img_size=56)),
    Variant("dinov2-registers", named("vit_small_patch14_reg4_dinov2", img_size=56), ("cls", *REGISTERS)),
    Variant(
        "dinov2-giant", named("vit_giant_patch14_reg4_dinov2", img_size=56), ("cls", *REGISTERS), gated=True
    ),
    Variant("gate-last", plain(mlp_layer=timm.layers.GluMlp), gated=True),
    Variant("aimv2", named("aimv2_large_patch14_224", img_size=56), (), gated=True),
    Variant("qk-norm", plain(qk_norm=True, class_token=False, global_pool="avg"), (), absent=("ln_final",)),
    Variant("beit3", named("beit3_base_patch16_224", img_size=64), absent=("ln_final",)),
    Variant("gated-attention", plain(attn_layer=GatedAttention)),
    Variant(
        "relative-positions", named("vit_relpos_small_patch16_224", img_size=64), (), absent=("ln_final",)
    ),
    Variant("hybrid", named("vit_tiny_r_s16_p8_224", img_size=128)),
    Variant("any-size", plain(dynamic_img_size=True)),
)

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
DINO = {**{key: value for key, value in CONFIG.items() if key != "intermediate_size"}, "mlp_ratio": 2}
CLIP = {**{key: value for key, value in CONFIG.items() if key != "num_labels"}, "projection_dim": 6}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
}


def hf(model: str, config: str, settings: dict[str, Any] = CONFIG, **options: Any) -> Callable[[], nn.Module]:
    """A transformers model from a small configuration."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings), **options)


def two_towers(model: str) -> Callable[[], nn.Module]:
    """A class that is made from CLIP's whole configuration."""
    options = {"vision_config": CLIP, "text_config": TEXT, "projection_dim": 6, "num_labels": 5}
    return lambda: getattr(transformers, model)(transformers.CLIPConfig(**options))


BOTH = ("cls", "distillation")
POOLER = {"output": "pooler_output", "absent": ("logits",)}
HIDDEN = {"output": "last_hidden_state", "absent": ("pooled", "logits")}
CLS_NORM = {"output": "pooler_output", "absent": ("ln_final", "logits")}
TRANSFORMERS = (
    Variant("ViTModel", hf("ViTModel", "ViTConfig"), **POOLER),
    Variant("ViTModel-unpooled", hf("ViTModel", "ViTConfig", add_pooling_layer=False), **HIDDEN),
    Variant("ViTForImageClassification", hf("ViTForImageClassification", "ViTConfig")),
    Variant("DeiTModel", hf("DeiTModel", "DeiTConfig"), BOTH, **POOLER),
    Variant("DeiTForImageClassification", hf("DeiTForImageClassification", "DeiTConfig"), BOTH),
    Variant(
        "DeiT-with-teacher",
        hf("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
        BOTH,
        absent=("pooled",),
    ),
    Variant("ViTMSNModel", hf("ViTMSNModel", "ViTMSNConfig"), **HIDDEN),
    Variant("ViTMSNForImageClassification", hf("ViTMSNForImageClassification", "ViTMSNConfig")),
    Variant("IJepaForImageClassification", hf("IJepaForImageClassification", "IJepaConfig"), ()),
    Variant("Dinov2Model", hf("Dinov2Model", "Dinov2Config", DINO), **POOLER),
    Variant(
        "Dinov2-swiglu",
        hf("Dinov2Model", "Dinov2Config", {**DINO, "use_swiglu_ffn": True}),
        gated=True,
        **POOLER,
    ),
    Variant("Dinov2ForImageClassification", hf("Dinov2ForImageClassification", "Dinov2Config", DINO)),
    Variant(
        "Dinov2WithRegistersModel",
        hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO),
        ("cls", *REGISTERS),
        **POOLER,
    ),
    Variant(
        "Dinov2WithRegistersForImageClassification",
        hf("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", DINO),
        ("cls", *REGISTERS),
    ),
    Variant("CLIPVisionModel", hf("CLIPVisionModel", "CLIPVisionConfig", CLIP), **CLS_NORM),
    Variant(
        "CLIPVisionModelWithProjection",
        hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", CLIP),
        output="image_embeds",
        absent=("ln_final",),
    ),
    Variant("CLIPForImageClassification", two_towers("CLIPForImageClassification"), absent=("ln_final",)),
    Variant("CLIPModel.vision_model", lambda: two_towers("CLIPModel")().vision_model, **CLS_NORM),
    Variant("MetaClip2VisionModel", hf("MetaClip2VisionModel", "MetaClip2VisionConfig", CLIP), **CLS_NORM),
)
VARIANTS = (*TIMM, *TRANSFORMERS)


@dataclass(frozen=True)
class Neighbour:
    """A model that no family describes, and words of the reason that must be given."""

    name: str
    build: Callable[[], nn.Module]
    reason: str

    def __str__(self) -> str:
        return self.name


NEIGHBOURS = (
    Neighbour("gated-block", plain(block_fn=GatedBlock), "blocks.0 (GatedBlock) also holds 'gate', unknown"),
    Neighbour(
        "swin",
        lambda: timm.create_model("swin_tiny_patch4_window7_224"),
        "no list of blocks at 'blocks'",
    ),
    Neighbour("resnet", lambda: timm.create_model("test_resnet"), "no list of blocks at 'blocks'"),
    Neighbour("one-channel", plain(in_chans=1), "it takes images of 1 channels, and images have 3"),
    Neighbour(
        "unfixed-grid",
        plain(img_size=None, dynamic_img_size=True, pos_embed="none", no_embed_class=True),
        "its patch grid is not fixed",
    ),
    Neighbour(
        "one-channel-norms-behind",
        named("vit_base_patch16_rpn_224", in_chans=1),
        "timm.post_norm: it takes images of 1 channels, and images have 3",
    ),
    Neighbour(
        "one-channel-any-size",
        named("naflexvit_base_patch16_gap", in_chans=1),
        "timm.naflex: it takes images of 1 channels, and images have 3",
    ),
    Neighbour(
        "ViTModel-one-channel",
        hf("ViTModel", "ViTConfig", {**CONFIG, "num_channels": 1}),
        "transformers.vit: it takes images of 1 channels, and images have 3",
    ),
    Neighbour(
        "ViTMAEModel",
        hf("ViTMAEModel", "ViTMAEConfig"),
        "it drops 75% of its patches at random, also in eval mode; set config.mask_ratio = 0",
    ),
    Neighbour(
        "SwinModel",
        hf("SwinModel", "SwinConfig", {"image_size": 32, "patch_size": 4, "depths": [1, 1], "num_heads": [2, 2]}),
        "no list of blocks at 'encoder.layer'",
    ),
    Neighbour(
        "ViTForMaskedImageModeling",
        hf("ViTForMaskedImageModeling", "ViTConfig"),
        "ViTForMaskedImageModeling also holds 'decoder'",
    ),
    Neighbour(
        "Dinov2Backbone", hf("Dinov2Backbone", "Dinov2Config", DINO), "it is a backbone that gives several"
    ),
    Neighbour("CLIPModel", two_towers("CLIPModel"), "it also holds a text tower; wrap its vision_model"),
    Neighbour(
        "tuples",
        hf("ViTModel", "ViTConfig", {**CONFIG, "return_dict": False}),
        "config.return_dict is False; set it to True",
    ),
)
