"""The vision tower of transformers' CLIP, bare, with projection, or with a classifier.

The towers of MetaCLIP 2, AltCLIP, Chinese CLIP and CLIPSeg are the same.
"""

from __future__ import annotations

from typing import Any

from vit_mechinterp.adapters.transformers_readout import base, readout, refusal, size_of, vision_config
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

NAMES = ("vision_model",)
PARTS = frozenset(
    {"embeddings", "pre_layrnorm", "encoder", "post_layernorm"}
)  # "layrnorm" is transformers' own
BLOCK = frozenset({"layer_norm1", "self_attn", "layer_norm2", "mlp"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "out_proj"})


def tokens(model: Any) -> TokenLayout:
    """CLS, patches."""
    config = vision_config(model)
    height, width = size_of(config.image_size)
    patch = size_of(config.patch_size)
    return TokenLayout(
        prefix=("cls",),
        grid=(height // patch[0], width // patch[1]),
        patch_size=patch,
        image_size=(height, width),
    )


def clip_readout(model: Any) -> Readout:
    """``post_layernorm`` acts on CLS alone, and the classifier's mean of patches is not normed at all."""
    return readout(
        model, "its last norm acts on CLS alone, after pooling; read pooled, or the last resid_post"
    )


def refuses(model: Any) -> str | None:
    """Two towers in one module have two inputs."""
    if hasattr(model, "text_model"):
        return "it also holds a text tower; wrap its vision_model"
    if not hasattr(base(model, *NAMES)[1], "pre_layrnorm"):
        return "it has no 'pre_layrnorm'"
    return refusal(model, NAMES, PARTS, tokens(model))


def d_model(model: Any) -> int:
    """Width of the residual stream."""
    return int(vision_config(model).hidden_size)


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    return int(attention.num_heads), int(attention.head_dim)


CLIP = Family(
    name="transformers.clip",
    library="transformers",
    blocks=("vision_model.encoder.layers", "encoder.layers"),
    attention="self_attn",
    out_projection="self_attn.out_proj",
    parts={"": BLOCK, "self_attn": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("layer_norm1"),),
        "attn_out": (Port("self_attn"),),
        "resid_mid": (Port("layer_norm2", "input", in_place=True),),
        "ln2": (Port("layer_norm2"),),
        "mlp.pre": (Port("mlp.fc1"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.fc2", "input"),),
        "mlp_out": (Port("mlp"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=clip_readout,
    refuses=refuses,
)
