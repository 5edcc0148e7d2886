"""transformers' Pix2Struct and Kosmos-2.5: patches come with the numbers of their rows and columns."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vit_mechinterp.adapters.transformers_packed import patches_of, tokens_of
from vit_mechinterp.adapters.transformers_readout import d_model, returns_tuple
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

PARTS = frozenset({"embeddings", "encoder", "layernorm"})
BLOCK = frozenset({"pre_attention_layer_norm", "attention", "pre_mlp_layer_norm", "mlp"})
ATTENTION = frozenset({"query", "key", "value", "output"})


def patch_of(model: Any) -> tuple[int, int]:
    """Size of a patch: a square of three channels is as wide as the projection's input."""
    edge = int((model.config.patch_embed_hidden_size // 3) ** 0.5)
    return edge, edge


def tokens(model: Any) -> TokenLayout:
    """Patches alone."""
    return tokens_of(model, 1, patch=patch_of(model))


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    return int(attention.n_heads), int(attention.inner_dim // attention.n_heads)


def inputs(model: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Every patch, channels last, behind the numbers of its row and its column, which begin with 1."""
    patches, grid = patches_of(x, patch_of(model), 1)
    _, rows, columns = grid[0].tolist()
    numbers = torch.cartesian_prod(torch.arange(1, rows + 1), torch.arange(1, columns + 1)).to(x)
    pixels = patches.permute(0, 2, 3, 1).reshape(len(x), rows * columns, -1)
    return (torch.cat([numbers.expand(len(x), -1, -1), pixels], dim=-1),), {}


def readout(model: Any) -> Readout:
    """The last norm acts on all tokens."""
    unpooled = f"{type(model).__name__} has no pooler"
    ports: dict[str, Port | str] = {"ln_final": Port("layernorm"), "pooled": unpooled}
    return Readout("last_hidden_state", {**ports, "logits": f"{type(model).__name__} has no head"})


def refuses(model: Any) -> str | None:
    """Other models around the same blocks."""
    held = {name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    foreign = ", ".join(map(repr, sorted(held - PARTS)))
    return f"it also holds {foreign}, unknown to this family" if foreign else None


KOSMOS2_5 = Family(
    name="transformers.kosmos2_5",
    library="transformers",
    blocks=("encoder.layer",),
    attention="attention",
    out_projection="attention.output",
    parts={"": BLOCK, "attention": ATTENTION},
    ports={
        "resid_pre": (Port("", "input", requires=(Port.has("attention.head_dim"),)),),
        "ln1": (Port("pre_attention_layer_norm"),),
        "attn_out": (Port("attention"),),
        "resid_mid": (Port("pre_mlp_layer_norm", "input", in_place=True),),
        "ln2": (Port("pre_mlp_layer_norm"),),
        "mlp.pre": (Port("mlp.wi_0"),),
        "mlp.pre_linear": (Port("mlp.wi_1"),),
        "mlp.post": (Port("mlp.wo", "input"),),
        "mlp_out": (Port("mlp"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=readout,
    inputs=inputs,
    returns_tuple=returns_tuple,
    refuses=refuses,
    any_size=lambda model: True,
)

PIX2STRUCT = dataclasses.replace(
    KOSMOS2_5,
    name="transformers.pix2struct",
    ports={
        **KOSMOS2_5.ports,
        "resid_pre": (Port("", "input", requires=(Port.has("attention.key_value_proj_dim"),)),),
    },
    returns_tuple=True,
)
