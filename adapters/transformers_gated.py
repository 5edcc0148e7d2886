"""transformers' vision towers with gated MLPs and RMSNorm: AIMv2, Ovis2, Pixtral."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vit_mechinterp.adapters.transformers_readout import (
    base,
    d_model,
    grid_of,
    heads,
    readout,
    refusal,
    returns_tuple,
)
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

NAMES = ("vision_model", "transformer")
PARTS = frozenset({"embeddings", "encoder", "rms_norm", "head"})
OVIS2_HEADS = ("head_linear", "head_norm")
BLOCK = frozenset({"rms_norm1", "attention", "rms_norm2", "ffn"})
PIXTRAL_PARTS = frozenset({"patch_conv", "ln_pre", "transformer", "patch_positional_embedding"})
PIXTRAL_BLOCK = frozenset({"attention_norm", "attention", "ffn_norm", "feed_forward"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "out_proj"})


def tokens(model: Any) -> TokenLayout:
    """Patches alone."""
    return grid_of(model, ())


def aimv2_readout(model: Any) -> Readout:
    """The last norm acts on all tokens, an attention head pools them."""
    prefix, inner = base(model, *NAMES)
    ln_final = Port(prefix + "rms_norm")
    if hasattr(model, "head_linear"):
        unpooled = "groups of tokens are read out one by one; read ln_final"
        ports: dict[str, Port | str] = {"pooled": unpooled, "logits": Port("head_norm")}
        return Readout("pooler_output", {"ln_final": ln_final, **ports})
    return readout(model, ln_final, pools=hasattr(inner, "head"))


def aimv2_refuses(model: Any) -> str | None:
    """Two towers in one module have two inputs."""
    if hasattr(model, "text_model"):
        return "it also holds a text tower; wrap its vision_model"
    if hasattr(model, "head_linear") and model.config.tokenize_function == "gumbel_argmax":
        return "it draws its visual words at random, also in eval mode"
    return refusal(model, (*NAMES, *OVIS2_HEADS), PARTS, tokens(model))


def pixtral_readout(model: Any) -> Readout:
    """There is no norm behind the last block."""
    return readout(model, "it has no last norm; read the last resid_post", pools=False)


def pixtral_refuses(model: Any) -> str | None:
    """Other models around the same blocks."""
    held = {name for name, _ in model.named_children()}
    if foreign := ", ".join(map(repr, sorted(held - PIXTRAL_PARTS))):
        return f"it also holds {foreign}, unknown to this family"
    return None


AIMV2 = Family(
    name="transformers.aimv2",
    library="transformers",
    blocks=("vision_model.encoder.layers", "transformer.encoder.layers", "encoder.layers"),
    attention="attention",
    out_projection="attention.out_proj",
    parts={"": BLOCK, "attention": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("rms_norm1"),),
        "attn_out": (Port("attention"),),
        "resid_mid": (Port("rms_norm2", "input", in_place=True),),
        "ln2": (Port("rms_norm2"),),
        "mlp.pre": (Port("ffn.gate_proj"),),
        "mlp.pre_linear": (Port("ffn.up_proj"),),
        "mlp.post": (Port("ffn.down_proj", "input"),),
        "mlp_out": (Port("ffn"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=aimv2_readout,
    refuses=aimv2_refuses,
)

def pixtral_inputs(model: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The images with their sizes, which transformers 4 does not read off them."""
    return (x,), {"image_sizes": torch.tensor([x.shape[-2:]] * len(x), device=x.device)}


PIXTRAL = Family(
    name="transformers.pixtral",
    library="transformers",
    blocks=("transformer.layers",),
    attention="attention",
    out_projection="attention.o_proj",
    parts={"": PIXTRAL_BLOCK, "attention": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("attention_norm"),),
        "attn_out": (Port("attention"),),
        "resid_mid": (Port("ffn_norm", "input", in_place=True),),
        "ln2": (Port("ffn_norm"),),
        "mlp.pre": (Port("feed_forward.gate_proj"),),
        "mlp.pre_linear": (Port("feed_forward.up_proj"),),
        "mlp.post": (Port("feed_forward.down_proj", "input"),),
        "mlp_out": (Port("feed_forward"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=pixtral_readout,
    inputs=pixtral_inputs,
    returns_tuple=returns_tuple,
    one_image="it packs all images of a batch into one sequence",
    refuses=pixtral_refuses,
    any_size=lambda model: True,  # positions are rotary
)
