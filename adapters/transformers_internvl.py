"""Vision towers whose LayerScale is a bare parameter behind no module: InternVL, Qianfan-OCR, Step 3.7.

The increments of the residual stream leave no module; they are differences of the stream's values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vit_mechinterp.adapters.transformers_readout import (
    d_model,
    grid_of,
    heads,
    prefix_of,
    readout,
    refusal,
)
from vit_mechinterp.model.layout import Difference, Family, Port, Readout, TokenLayout

PARTS = frozenset({"embeddings", "encoder", "layers", "layernorm"})
BLOCK = frozenset(
    {"layernorm_before", "attention", "layernorm_after", "mlp", "dropout", "lambda_1", "lambda_2"}
    | {"drop_path1", "drop_path2"}
)
ATTENTION = frozenset(
    {"q_proj", "k_proj", "v_proj", "projection_layer", "projection_dropout", "q_norm", "k_norm"}
)


def tokens(model: Any) -> TokenLayout:
    """CLS, patches."""
    return grid_of(model, prefix_of(model.embeddings))


def internvl_readout(model: Any) -> Readout:
    """The last norm is an identity where the language model pools."""
    ln_final: Port | str = Port("layernorm")
    if model.config.use_mean_pooling:
        ln_final = "it has no last norm; read the last resid_post"
    return readout(model, ln_final, pools=False)


def refuses(model: Any) -> str | None:
    """Other models around the same blocks."""
    return refusal(model, (), PARTS, tokens(model))


INTERNVL = Family(
    name="transformers.internvl",
    library="transformers",
    blocks=("encoder.layer", "layers"),
    attention="attention",
    out_projection="attention.projection_layer",
    attention_scale=("lambda_1",),
    parts={"": BLOCK, "attention": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("layernorm_before"),),
        "attn_out": (Port("drop_path1"), Difference("resid_mid", "resid_pre")),
        "resid_mid": (Port("layernorm_after", "input", in_place=True),),
        "ln2": (Port("layernorm_after"),),
        "mlp.pre": (Port("mlp.fc1"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.fc2", "input"),),
        "mlp_out": (Port("drop_path2"), Difference("resid_post", "resid_mid")),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=internvl_readout,
    refuses=refuses,
)

STEP3_PARTS = frozenset(
    {"embeddings", "pre_layernorm", "rotary_emb", "layers", "downsampler1", "downsampler2"}
)
STEP3_BLOCK = frozenset({"layernorm_before", "self_attn", "layernorm_after", "mlp", "lambda_1", "lambda_2"})


def step3_readout(model: Any) -> Readout:
    """Convolutions make the output of the last block."""
    convolved = "convolutions follow the last block; read the last resid_post"
    ports: dict[str, Port | str] = dict.fromkeys(("ln_final", "pooled", "logits"), convolved)
    return Readout("last_hidden_state", ports)


STEP3 = dataclasses.replace(
    INTERNVL,
    name="transformers.step3",
    blocks=("layers",),
    attention="self_attn",
    out_projection="self_attn.out_proj",
    parts={"": STEP3_BLOCK, "self_attn": frozenset({"q_proj", "k_proj", "v_proj", "out_proj"})},
    readout=step3_readout,
    refuses=lambda model: refusal(model, (), STEP3_PARTS, tokens(model)),
    counts_rows=True,  # the output is made into a map with as many rows as images went in
)
