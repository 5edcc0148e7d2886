"""open_clip's vision towers: its own `VisionTransformer`, and timm models behind a projection.

Attention is torch's `nn.MultiheadAttention` (see `vit_mechinterp.model.multihead`), or in custom blocks a
module of open_clip's own. ``ls_1`` and ``ls_2`` are always modules, and put out the increments of the stream.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from vit_mechinterp.adapters.timm_inside import inside
from vit_mechinterp.adapters.timm_vit import wrong_channels
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

EMBEDDINGS = {"conv1", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre"}
PARTS = frozenset(EMBEDDINGS | {"transformer", "attn_pool", "ln_post", "proj"})
BLOCK = frozenset({"ln_1", "attn", "ln_attn", "ls_1", "ln_2", "mlp", "ls_2"})
PROJECTIONS = {"in_proj_weight", "in_proj_bias", "out_proj"}
ATTENTION = frozenset(PROJECTIONS | {"ln_q", "ln_k", "attn_drop", "head_scale", "ln_inner", "out_drop"})
HEAD = frozenset({"drop", "proj", "mlp"})


def tokens(model: Any) -> TokenLayout:
    """CLS, patches."""
    return TokenLayout(("cls",), tuple(model.grid_size), tuple(model.patch_size), tuple(model.image_size))


def readout(model: Any) -> Readout:
    """A norm and pooling in either order, then a projection by a bare matrix."""
    ln_final: Port | str = Port("ln_post")
    pooled: Port | str = "tokens are pooled and projected between modules; read ln_final, or logits"
    if model.attn_pool is not None:
        ln_final = "its last norm acts on what attention pools; read logits, or the last resid_post"
        pooled = "an attention head pools the tokens, which are projected between modules; read logits"
    elif model.final_ln_after_pool:
        ln_final, pooled = "its last norm acts on the pooled vector; read pooled", Port("ln_post")
    elif model.pool_type == "none":
        pooled = "the model is made without pooling; read ln_final"
    name = "image_embeds" if model.pool_type != "none" or model.attn_pool is not None else "projected_tokens"
    ports: dict[str, Port | str] = {"ln_final": ln_final, "pooled": pooled, "logits": Port("")}
    if model.proj is None:
        ports["logits"] = "the model has no projection"
        name = "pooled" if name == "image_embeds" else "last_hidden_state"
        if name == "pooled" and not isinstance(pooled, Port):
            ports["pooled"] = Port("")
    # With output_tokens the model returns a pair, of which the first is this.
    return Readout(0 if model.output_tokens else None, ports, name)


def d_model(model: Any) -> int:
    """Width of the residual stream."""
    return int(model.conv1.out_channels)


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    return int(attention.num_heads), int(attention.head_dim)


def refuses(model: Any) -> str | None:
    """Text towers, whose blocks are the same, and models of both towers."""
    if hasattr(model, "visual"):
        return "it also holds a text tower; wrap its visual"
    if not hasattr(model, "conv1"):
        return "it takes no images"
    held = [name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))]
    foreign = ", ".join(repr(name) for name in held if name not in PARTS)
    if foreign:
        return f"{type(model).__name__} also holds {foreign}, unknown to this family"
    if not model.transformer.batch_first:
        return "its blocks take tokens before images; make it with batch_first=True"
    return wrong_channels(model)


def no_results(block: Any) -> str | None:
    """Custom blocks may have a norm between the output projection and the stream."""
    if isinstance(getattr(block, "ln_attn", None), nn.LayerNorm):
        return "a norm stands between the heads' results and the stream, which is not their sum"
    return None


VIT = Family(
    name="open_clip.vit",
    library="open_clip",
    blocks=("transformer.resblocks", "visual.transformer.resblocks"),
    attention="attn",
    out_projection="attn.out_proj",
    attention_scale=("ls_1.gamma",),
    parts={"": BLOCK, "attn": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("ln_1"),),
        "attn.result": (Port("attn.out_proj", "input", token_first=True),),
        "attn_out": (Port("ls_1"),),
        "resid_mid": (Port("ln_2", "input", in_place=True),),
        "ln2": (Port("ln_2"),),
        "mlp.pre": (Port("mlp.c_fc"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.c_proj", "input"),),
        "mlp_out": (Port("ls_2"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=readout,
    refuses=lambda model: refuses(model) or custom_blocks(model),
)


def custom_blocks(model: Any) -> str | None:
    """Whether attention is a module of open_clip's own."""
    own = not isinstance(model.transformer.resblocks[0].attn, nn.MultiheadAttention)
    return "its attention is a module of its own" if own else None


CUSTOM = dataclasses.replace(
    VIT,
    name="open_clip.vit_custom",
    ports={site: ports for site, ports in VIT.ports.items() if site != "attn.result"},
    absent={"attn.result": no_results},
    refuses=refuses,
)
"""Blocks with norms of queries and keys, scaled heads, or norms inside attention and MLP."""


def trunk_readout(model: Any, native: Readout) -> Readout:
    """What the trunk puts out, then a projection (none where the trunk's own head projects)."""
    unprojected = isinstance(native.ports["logits"], str) and not len(model.head)
    if unprojected:
        return native
    return Readout(None, {**native.ports, "logits": Port("")}, "image_embeds")


def around(family: Family) -> Family:
    """The row of a timm family for open_clip's vision tower around one of its models."""

    def refuses_tower(model: Any) -> str | None:
        foreign = [name for name, _ in model.head.named_children() if name not in HEAD]
        if foreign:
            return f"the head also holds {', '.join(map(repr, foreign))}, unknown to this family"
        return family.refuses(model.trunk)

    row = inside(family, "trunk", "open_clip", "open_clip.timm", trunk_readout)
    return dataclasses.replace(row, refuses=refuses_tower)
