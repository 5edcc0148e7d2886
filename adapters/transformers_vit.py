"""transformers' ViT, DeiT (with and without teacher), ViT-MSN and I-JEPA."""

from __future__ import annotations

from typing import Any

from vit_mechinterp.adapters.transformers_readout import base, readout, refusal, size_of
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

NAMES = ("vit", "deit", "ijepa")
PARTS = frozenset({"embeddings", "layers", "layernorm", "pooler"})
BLOCK = frozenset({"layernorm_before", "attention", "layernorm_after", "mlp", "dropout"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


def tokens(model: Any) -> TokenLayout:
    """CLS (not in I-JEPA), DeiT's distillation token, patches."""
    embeddings = base(model, *NAMES)[1].embeddings
    height, width = size_of(model.config.image_size)
    patch = size_of(model.config.patch_size)
    cls = getattr(embeddings, "cls_token", None)
    prefix = ("cls",) * (0 if cls is None else cls.shape[1])
    if getattr(embeddings, "distillation_token", None) is not None:
        prefix += ("distillation",)
    return TokenLayout(
        prefix=prefix,
        grid=(height // patch[0], width // patch[1]),
        patch_size=patch,
        image_size=(height, width),
    )


def vit_readout(model: Any) -> Readout:
    """The final norm acts on all tokens."""
    return readout(
        model,
        Port(base(model, *NAMES)[0] + "layernorm"),
        pools=getattr(model, "pooler", None) is not None,
    )


def refuses(model: Any) -> str | None:
    """Masked autoencoders and other models around the same blocks."""
    return refusal(model, NAMES, PARTS, tokens(model))


def d_model(model: Any) -> int:
    """Width of the residual stream."""
    return int(model.config.hidden_size)


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    return int(attention.num_attention_heads), int(attention.head_dim)


VIT = Family(
    name="transformers.vit",
    library="transformers",
    blocks=("vit.layers", "deit.layers", "ijepa.layers", "layers"),
    attention="attention",
    out_projection="attention.o_proj",
    parts={"": BLOCK, "attention": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("layernorm_before"),),
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
    refuses=refuses,
)
