"""transformers' DINOv2 and its relatives: LayerScale modules behind attention and MLP, plain or gated MLPs.

DINOv2 (with and without registers), DINOv3, TIPSv2, RADIO, Sapiens2 and the encoder part of EoMT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_mechinterp.adapters.transformers_readout import (
    base,
    config_of,
    d_model,
    grid_of,
    heads,
    prefix_of,
    readout,
    refusal,
    returns_tuple,
    size_of,
)
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

NAMES = ("dinov2", "dinov2_with_registers", "vision_model")
ENCODER = frozenset({"embeddings", "encoder", "layernorm"})
ROPE = frozenset({"embeddings", "rope_embeddings", "model", "norm", "layer"})
RADIO = frozenset({"input_conditioner"})
EOMT = frozenset({"query", "layers", "upscale_block", "mask_head", "class_predictor", "criterion", "dropout"})
BLOCK = frozenset({"norm1", "attention", "layer_scale1", "norm2", "mlp", "layer_scale2", "drop_path"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "q_norm", "k_norm"})


def tokens(model: Any) -> TokenLayout:
    """CLS, registers, patches."""
    inner = base(model, *NAMES)[1]
    own = getattr(inner.embeddings, "cls_register_token", None)
    if own is None:
        return grid_of(inner, prefix_of(inner.embeddings))
    config = config_of(inner)
    prefix = ("cls",) * config.num_cls_tokens + ("registers",) * (len(own) - config.num_cls_tokens)
    side, patch = config.image_size, size_of(config.patch_size)
    height, width = size_of(side)
    return TokenLayout(prefix, (height // patch[0], width // patch[1]), patch, (height, width))


def dinov2_readout(model: Any) -> Readout:
    """The final norm acts on all tokens; the classifier reads CLS beside the mean of the patches."""
    prefix, inner = base(model, *NAMES)
    if hasattr(inner, "input_conditioner"):
        reason = "it gives out its last residual stream as it is; read the last resid_post"
        ports: dict[str, Port | str] = dict.fromkeys(("ln_final", "pooled", "logits"), reason)
        return Readout("last_hidden_state", ports)
    if hasattr(inner, "class_predictor"):
        queries = "its object queries are read out one by one, with those of earlier blocks; read logits"
        logits = Port("", field="class_queries_logits")
        return Readout("class_queries_logits", {"ln_final": queries, "pooled": queries, "logits": logits})
    norm = "layernorm" if hasattr(inner, "layernorm") else "norm"
    return readout(model, Port(prefix + norm))


def strangers(model: Any) -> Mapping[int, str]:
    """EoMT's object queries join the stream in front of its last blocks."""
    if not hasattr(model, "class_predictor"):
        return {}
    layers = range(len(model.layers) - model.config.num_blocks, len(model.layers))
    reason = "object queries have joined the stream, so its tokens are not those of the layout"
    return dict.fromkeys(layers, reason)


def refuses(model: Any) -> str | None:
    """Backbones and other models around the same blocks."""
    inner = base(model, *NAMES)[1]
    parts = ENCODER | ROPE | RADIO | (EOMT if hasattr(inner, "class_predictor") else frozenset())
    if hasattr(model, "class_predictor") and model.config.num_blocks >= len(model.layers):
        return "object queries are in the stream of all its blocks"
    return refusal(model, NAMES, parts, tokens(model))


DINOV2 = Family(
    name="transformers.dinov2",
    library="transformers",
    blocks=(
        "dinov2.encoder.layer",
        "dinov2_with_registers.encoder.layer",
        "vision_model.encoder.layer",
        "encoder.layer",
        "model.layer",
        "layer",
        "layers",
    ),
    attention="attention",
    out_projection="attention.o_proj",
    parts={"": BLOCK, "attention": ATTENTION},
    attention_scale=("layer_scale1.lambda1",),
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("norm1"),),
        "attn_out": (Port("layer_scale1"),),
        "resid_mid": (Port("norm2", "input", in_place=True),),
        "ln2": (Port("norm2"),),
        "mlp.pre": (Port("mlp.gate_proj"), Port("mlp.fc1"), Port("mlp.up_proj")),
        "mlp.pre_linear": (Port("mlp.up_proj", requires=(Port.has("mlp.gate_proj"),)),),
        "mlp.post": (Port("mlp.down_proj", "input"), Port("mlp.fc2", "input")),
        "mlp_out": (Port("layer_scale2"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=dinov2_readout,
    strangers=strangers,
    refuses=refuses,
    any_size=lambda model: not hasattr(model, "class_predictor"),  # positions are interpolated or rotary
)

EOMT_STYLE = dataclasses.replace(
    DINOV2,
    name="transformers.eomt",
    out_projection="attention.out_proj",
)

DINOV2_BERT = dataclasses.replace(
    DINOV2,
    name="transformers.dinov2_bert_style",
    attention="attention.attention",
    out_projection="attention.output.dense",
    parts={"": BLOCK, "attention.attention": frozenset({"query", "key", "value", "dropout"})},
    ports={
        **DINOV2.ports,
        "mlp.pre": (Port("mlp.weights_in", part=(0, 2)), Port("mlp.fc1")),
        "mlp.pre_linear": (Port("mlp.weights_in", part=(1, 2)),),
        "mlp.post": (Port("mlp.weights_out", "input"), Port("mlp.fc2", "input")),
    },
    returns_tuple=returns_tuple,
)
"""DINOv2 with and without registers in transformers 4: attention as in BERT, and gates packed with values."""
