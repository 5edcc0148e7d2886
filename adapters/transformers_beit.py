"""transformers' BEiT and Data2Vec-Vision: relative position biases, and LayerScale as bare parameters.

``drop_path`` is one module that every block calls twice, after LayerScale: first with the increment of the
attention, then with that of the MLP.
"""

from __future__ import annotations

from typing import Any

from vit_mechinterp.adapters.transformers_readout import (
    base,
    d_model,
    grid_of,
    heads,
    prefix_of,
    readout,
    refusal,
    returns_tuple,
)
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

NAMES = ("beit", "data2vec_vision")
PARTS = frozenset({"embeddings", "layers", "encoder", "layernorm", "pooler", "shared_position_bias"})
COMMON = {"layernorm_before", "attention", "layernorm_after", "drop_path", "lambda_1", "lambda_2"}
BEIT_BLOCK = frozenset(COMMON | {"mlp", "dropout", "relative_position_bias"})
BEIT_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
DATA2VEC_BLOCK = frozenset(COMMON | {"intermediate", "output"})
DATA2VEC_ATTENTION = frozenset({"query", "key", "value", "dropout", "relative_position_bias"})


def tokens(model: Any) -> TokenLayout:
    """CLS, patches."""
    return grid_of(model, prefix_of(base(model, *NAMES)[1].embeddings))


def beit_readout(model: Any) -> Readout:
    """With mean pooling the last norm acts on the pooled vector."""
    prefix, inner = base(model, *NAMES)
    ln_final: Port | str = Port(prefix + "layernorm")
    if model.config.use_mean_pooling:
        ln_final = "its last norm acts on the mean of the patches; read pooled, or the last resid_post"
    return readout(model, ln_final, pools=inner.pooler is not None)


def refuses(model: Any) -> str | None:
    """Other models around the same blocks."""
    return refusal(model, NAMES, PARTS, tokens(model))


BEIT = Family(
    name="transformers.beit",
    library="transformers",
    blocks=("beit.layers", "layers"),
    attention="attention",
    out_projection="attention.o_proj",
    attention_scale=("lambda_1",),
    parts={"": BEIT_BLOCK, "attention": BEIT_ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("layernorm_before"),),
        "attn_out": (Port("drop_path", call=0),),
        "resid_mid": (Port("layernorm_after", "input", in_place=True),),
        "ln2": (Port("layernorm_after"),),
        "mlp.pre": (Port("mlp.fc1"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.fc2", "input"),),
        "mlp_out": (Port("drop_path", call=1),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=beit_readout,
    refuses=refuses,
)

DATA2VEC = Family(
    name="transformers.data2vec_vision",
    library="transformers",
    blocks=("data2vec_vision.encoder.layer", "beit.encoder.layer", "encoder.layer"),
    attention="attention.attention",
    out_projection="attention.output.dense",
    attention_scale=("lambda_1",),
    parts={"": DATA2VEC_BLOCK, "attention.attention": DATA2VEC_ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("layernorm_before"),),
        "attn_out": (Port("drop_path", call=0),),
        "resid_mid": (Port("layernorm_after", "input", in_place=True),),
        "ln2": (Port("layernorm_after"),),
        "mlp.pre": (Port("intermediate.dense"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("output.dense", "input"),),
        "mlp_out": (Port("drop_path", call=1),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=beit_readout,
    returns_tuple=returns_tuple,
    refuses=refuses,
)
"""In transformers 4 also the layout of BEiT."""
