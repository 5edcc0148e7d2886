"""The vision towers of transformers' InternVL and Qianfan-OCR: LayerScale as bare parameters, no module behind it.

The increments of the residual stream leave no module; they are differences of the stream's values.
"""

from __future__ import annotations

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
        "attn.result": (Port("attention.projection_layer", "input"),),
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
