"""transformers' MGP-STR (text in images): packed q, k and v, attention written out."""

from __future__ import annotations

from typing import Any

from vit_mechinterp.adapters.transformers_readout import d_model, grid_of, heads, readout, refusal
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

PARTS = frozenset({"embeddings", "encoder"})
BLOCK = frozenset({"norm1", "attn", "drop_path", "norm2", "mlp"})
ATTENTION = frozenset({"qkv", "attn_drop", "proj", "proj_drop"})


def tokens(model: Any) -> TokenLayout:
    """CLS, patches."""
    return grid_of(model, ("cls",))


def mgp_str_readout(model: Any) -> Readout:
    """There is no norm behind the last block."""
    return readout(model, "it has no last norm; read the last resid_post", pools=False)


def refuses(model: Any) -> str | None:
    """The three heads that read characters give three outputs."""
    return refusal(model, (), PARTS, tokens(model))


MGP_STR = Family(
    name="transformers.mgp_str",
    library="transformers",
    blocks=("encoder.blocks",),
    attention="attn",
    out_projection="attn.proj",
    parts={"": BLOCK, "attn": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("norm1"),),
        "attn_out": (Port("drop_path", call=0),),
        "resid_mid": (Port("norm2", "input", in_place=True),),
        "ln2": (Port("norm2"),),
        "mlp.pre": (Port("mlp.fc1"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.fc2", "input"),),
        "mlp_out": (Port("drop_path", call=1),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=mgp_str_readout,
    returns_tuple=True,
    refuses=refuses,
)
