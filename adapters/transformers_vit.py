"""transformers' ViT and DeiT (with and without teacher)."""

from __future__ import annotations

from typing import Any

from vit_mechinterp.adapters.transformers_readout import base, readout, size_of
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout


def tokens(model: Any) -> TokenLayout:
    """CLS, DeiT's distillation token, patches."""
    embeddings = base(model, "vit", "deit")[1].embeddings
    height, width = size_of(model.config.image_size)
    patch = size_of(model.config.patch_size)
    distilled = getattr(embeddings, "distillation_token", None) is not None
    return TokenLayout(
        prefix=("cls", "distillation") if distilled else ("cls",),
        grid=(height // patch[0], width // patch[1]),
        patch_size=patch,
        image_size=(height, width),
    )


def vit_readout(model: Any) -> Readout:
    """The final norm acts on all tokens."""
    return readout(model, Port(base(model, "vit", "deit")[0] + "layernorm"))


def d_model(model: Any) -> int:
    """Width of the residual stream."""
    return int(model.config.hidden_size)


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    return int(attention.num_attention_heads), int(attention.head_dim)


VIT = Family(
    name="transformers.vit",
    library="transformers",
    blocks=("vit.layers", "deit.layers", "layers"),
    attention="attention",
    out_projection="attention.o_proj",
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("layernorm_before"),),
        "attn.result": (Port("attention.o_proj", "input"),),
        "attn_out": (Port("attention"),),
        "resid_mid": (Port("layernorm_after", "input", in_place=True),),
        "ln2": (Port("layernorm_after"),),
        "mlp.pre": (Port("mlp.fc1"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.fc2", "input"),),
        "mlp_out": (Port("mlp"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=vit_readout,
)
