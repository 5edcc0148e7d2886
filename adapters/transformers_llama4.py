"""The vision tower of transformers' Llama 4: CLS behind the patches, blocks that return tuples."""

from __future__ import annotations

from typing import Any

from vit_mechinterp.adapters.transformers_readout import d_model, grid_of, heads
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

PARTS = frozenset(
    {"patch_embedding", "class_embedding", "positional_embedding_vlm", "rotary_embedding", "layernorm_pre"}
    | {"layernorm_post", "model", "vision_adapter"}
)
BLOCK = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


def tokens(model: Any) -> TokenLayout:
    """Patches, CLS."""
    return grid_of(model, (), ("cls",))


def llama4_readout(model: Any) -> Readout:
    """The last norm acts on all tokens; an adapter makes the language model's tokens of the patches."""
    ports: dict[str, Port | str] = {"ln_final": Port("layernorm_post")}
    for site in ("pooled", "logits"):
        ports[site] = "an adapter makes the language model's tokens of the patches; read ln_final"
    return Readout("last_hidden_state", ports)


def refuses(model: Any) -> str | None:
    """Other models around the same blocks."""
    held = {name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    foreign = ", ".join(map(repr, sorted(held - PARTS)))
    return f"it also holds {foreign}, unknown to this family" if foreign else None


LLAMA4 = Family(
    name="transformers.llama4",
    library="transformers",
    blocks=("model.layers",),
    attention="self_attn",
    out_projection="self_attn.o_proj",
    parts={"": BLOCK, "self_attn": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("input_layernorm"),),
        "attn_out": (Port("self_attn"),),
        "resid_mid": (Port("post_attention_layernorm", "input", in_place=True),),
        "ln2": (Port("post_attention_layernorm"),),
        "mlp.pre": (Port("mlp.fc1"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.fc2", "input"),),
        "mlp_out": (Port("mlp"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=llama4_readout,
    returns_tuple=True,
    refuses=refuses,
)
