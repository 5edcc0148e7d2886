"""transformers' SAM image encoders: tokens stay a map, and most blocks attend inside windows.

A window is a batch of its own to the attention, padded at the border, so what stands inside the attention of
such a block is not in the stream's tokens; only blocks with global attention have those sites. Where
positions are relative, the bias is made of q: an edit of ``attn.q`` does not change the bias.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from vit_mechinterp.adapters.transformers_readout import base, d_model, grid_of, heads, returns_tuple
from vit_mechinterp.model.layout import TAP_SITES, Difference, Family, Port, Readout, TokenLayout

NAMES = ("vision_encoder",)
PARTS = frozenset({"patch_embed", "pos_embed", "layers", "neck", "proj", "multi_modal_projector"})
BLOCK = frozenset({"layer_norm1", "attn", "layer_norm2", "mlp"})
ATTENTION = frozenset({"qkv", "proj", "rel_pos_h", "rel_pos_w"})


def windowed(block: Any) -> str | None:
    """Why a block's attention is not in the tokens of the stream."""
    if block.window_size > 0:
        return f"this block attends inside windows of {block.window_size} x {block.window_size} tokens"
    return None


def tokens(model: Any) -> TokenLayout:
    """Patches alone."""
    return grid_of(base(model, *NAMES)[1], ())


def sam_readout(model: Any) -> Readout:
    """A convolutional neck makes the image embedding."""
    neck = "a convolutional neck follows the last block; read the last resid_post"
    ports: dict[str, Port | str] = {"ln_final": neck, "pooled": neck, "logits": "it has no head"}
    projected = hasattr(base(model, *NAMES)[1], "multi_modal_projector")
    return Readout("pooler_output" if projected else "last_hidden_state", ports)


def refuses(model: Any) -> str | None:
    """Prompt encoders and mask decoders take more than an image."""
    inner = base(model, *NAMES)[1]
    allowed: dict[int, frozenset[str]] = {id(model): frozenset(NAMES), id(inner): PARTS}
    for module in dict.fromkeys((model, inner)):
        held = {name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))}
        if foreign := ", ".join(map(repr, sorted(held - allowed[id(module)]))):
            return f"{type(module).__name__} also holds {foreign}; wrap its vision_encoder"
    if not isinstance(getattr(inner, "neck", None), nn.Module):
        return "it has no neck"
    return None


SAM = Family(
    name="transformers.sam",
    library="transformers",
    blocks=("vision_encoder.layers", "layers"),
    attention="attn",
    out_projection="attn.proj",
    parts={"": BLOCK, "attn": ATTENTION},
    absent=dict.fromkeys((*TAP_SITES, "attn.result"), windowed),
    ports={
        "resid_pre": (Port("", "input", spatial=True),),
        "ln1": (Port("layer_norm1", spatial=True),),
        "attn_out": (
            Port("attn", spatial=True, requires=(Port.has("window_size", 0),)),
            Difference("resid_mid", "resid_pre"),
        ),
        "resid_mid": (Port("layer_norm2", "input", in_place=True, spatial=True),),
        "ln2": (Port("layer_norm2", spatial=True),),
        "mlp.pre": (Port("mlp.lin1", spatial=True),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.lin2", "input", spatial=True),),
        "mlp_out": (Port("mlp", spatial=True),),
        "resid_post": (Port("", spatial=True),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=sam_readout,
    returns_tuple=returns_tuple,
    refuses=refuses,
)

SAM3_PARTS = frozenset({"embeddings", "layer_norm", "layers"})
SAM3_BLOCK = frozenset({"layer_norm1", "rotary_emb", "attention", "layer_norm2", "mlp", "dropout"})


def sam3_readout(model: Any) -> Readout:
    """There is no norm behind the last block."""
    reason = "its output is the last residual stream; read the last resid_post"
    ports: dict[str, Port | str] = dict.fromkeys(("ln_final", "pooled", "logits"), reason)
    return Readout("last_hidden_state", ports)


def sam3_refuses(model: Any) -> str | None:
    """Other models around the same blocks; learned positions are tiled to the size of the image."""
    held = {name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    foreign = ", ".join(map(repr, sorted(held - SAM3_PARTS)))
    return f"it also holds {foreign}, unknown to this family" if foreign else None


SAM3 = dataclasses.replace(
    SAM,
    name="transformers.sam3",
    blocks=("layers",),
    attention="attention",
    out_projection="attention.o_proj",
    parts={"": SAM3_BLOCK, "attention": frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})},
    ports={
        **SAM.ports,
        "attn_out": (
            Port("attention", spatial=True, requires=(Port.has("window_size", 0),)),
            Difference("resid_mid", "resid_pre"),
        ),
        "mlp.pre": (Port("mlp.fc1", spatial=True),),
        "mlp.post": (Port("mlp.fc2", "input", spatial=True),),
        "mlp_out": (Port("dropout", spatial=True),),
    },
    readout=sam3_readout,
    refuses=sam3_refuses,
    counts_rows=True,  # the output is reshaped to as many rows as images went in
)
