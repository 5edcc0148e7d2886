"""transformers' vision tower of Gemma 4: norms before and behind attention and MLP, positions as inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vit_mechinterp.adapters.transformers_packed import packing_of, patches_of, tokens_of
from vit_mechinterp.adapters.transformers_readout import d_model, size_of
from vit_mechinterp.model.layout import Family, Port, Readout, Rows, TokenLayout

PARTS = frozenset({"patch_embedder", "encoder", "pooler"})
BLOCK = frozenset(
    {"input_layernorm", "self_attn", "post_attention_layernorm"}
    | {"pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"}
)
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "v_norm"})


def pooled_of(model: Any) -> int:
    """Edge of the groups of tokens whose mean is put out."""
    return int(model.config.pooling_kernel_size)


def tokens(model: Any) -> TokenLayout:
    """Patches alone."""
    return tokens_of(model, pooled_of(model))


def packing(model: Any, layout: TokenLayout) -> Rows:
    """The means of all images are put out in one sequence."""
    return Rows(packing_of(model, layout, 1, pooled_of(model)).outputs)


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    return int(attention.q_proj.linear.out_features // attention.head_dim), int(attention.head_dim)


def inputs(model: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Patches row by row, channels last, and the column and row of each."""
    patches, grid = patches_of(x, size_of(model.config.patch_size), 1)
    _, rows, columns = grid[0].tolist()
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1).to(x.device)
    pixels = patches.permute(0, 2, 3, 1).reshape(len(x), rows * columns, -1)
    return (pixels, places.repeat(len(x), 1, 1)), {}


def readout(model: Any) -> Readout:
    """Means of groups of tokens; no norm on the tokens."""
    unpooled = "its output is the mean of every group of tokens"
    unnormed = "no norm acts on the tokens behind the last block; read the last resid_post"
    headless = f"{type(model).__name__} has no head"
    return Readout("last_hidden_state", {"ln_final": unnormed, "pooled": unpooled, "logits": headless})


def refuses(model: Any) -> str | None:
    """Other models around the same blocks."""
    held = {name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    foreign = ", ".join(map(repr, sorted(held - PARTS)))
    return f"it also holds {foreign}, unknown to this family" if foreign else None


GEMMA4 = Family(
    name="transformers.gemma4",
    library="transformers",
    blocks=("encoder.layers",),
    attention="self_attn",
    out_projection="self_attn.o_proj.linear",
    parts={"": BLOCK, "self_attn": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("input_layernorm"),),
        "attn_out": (Port("post_attention_layernorm"),),
        "resid_mid": (Port("pre_feedforward_layernorm", "input", in_place=True),),
        "ln2": (Port("pre_feedforward_layernorm"),),
        "mlp.pre": (Port("mlp.gate_proj"),),
        "mlp.pre_linear": (Port("mlp.up_proj"),),
        "mlp.post": (Port("mlp.down_proj", "input"),),
        "mlp_out": (Port("post_feedforward_layernorm"),),
        "resid_post": (Port(""),),
    },
    absent={"attn.result": "a norm acts on the sum of the heads, so no head has an increment of its own"},
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=readout,
    inputs=inputs,
    packing=packing,
    counts_rows=True,  # the pooler counts on the positions that went in
    refuses=refuses,
    any_size=lambda model: True,
)
