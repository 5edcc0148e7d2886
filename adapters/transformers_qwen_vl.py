"""transformers' vision towers in the style of Qwen2-VL: ``attn`` between ``norm1`` and ``norm2``.

Qwen2-VL to Qwen3.5 (and Omni), Command A Vision's Compass, GLM-4V to GLM-OCR, GLM-Image, ERNIE 4.5 VL, EXAONE
4.5, Kimi K2.5, dots.note, Muse. Where some blocks attend inside windows, their pattern is zero outside.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vit_mechinterp.adapters.transformers_packed import (
    foreign_parts,
    frames_of,
    merge_of,
    packing_of,
    patches_of,
    repeated,
    tokens_of,
)
from vit_mechinterp.adapters.transformers_readout import heads, size_of
from vit_mechinterp.model.layout import Family, Packing, Port, Readout, TokenLayout

PARTS = frozenset(
    {"patch_embed", "pos_embed", "embeddings", "post_conv_layernorm", "rotary_pos_emb", "blocks"}
    | {"post_layernorm", "downsample", "merger", "deepstack_merger_list", "merger_list", "ln", "norm"}
    | {"patch_embedder", "ln_pre", "rotary_emb", "layers", "ln_post", "final_layernorm"}
)
BLOCK = frozenset({"norm1", "attn", "norm2", "mlp"})
ATTENTION = frozenset(
    {"qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "proj"}
)
NORMS = ("post_layernorm", "final_layernorm", "norm", "ln", "merger.ln_q", "merger.norm")


def merged_of(model: Any) -> int:
    """Edge of the groups of tokens that make one of the output."""
    if hasattr(model, "patch_embedder"):
        return int(model.config.merge_size)
    if hasattr(model.config, "merge_kernel_size"):
        return size_of(model.config.merge_kernel_size)[0]
    return merge_of(model) if hasattr(model, "merger") else 1


def tokens(model: Any) -> TokenLayout:
    """Patches alone."""
    return tokens_of(model, max(merge_of(model), merged_of(model)))


def packing(model: Any, layout: TokenLayout) -> Packing:
    """Patches come in the groups that are merged."""
    return packing_of(model, layout, merge_of(model), merged_of(model))


def d_model(model: Any) -> int:
    """Width of the residual stream: that of the first norm, since configurations name it differently."""
    blocks = model.blocks if hasattr(model, "blocks") else model.layers
    return int(blocks[0].norm1.weight.shape[0])


def inputs(model: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Flattened patches in the order of the tower's image processor, and the grid of every image."""
    patches, grid = patches_of(x, size_of(model.config.patch_size), merge_of(model))
    if hasattr(model, "patch_embedder"):
        frames = int(model.config.patch_temporal)
        return (patches[:, None].expand(-1, frames, -1, -1, -1).flatten(1), grid), {}
    if hasattr(model.patch_embed, "pos_emb"):
        return (patches, grid), {}
    return (repeated(patches, frames_of(model.patch_embed.proj)), grid), {}


def readout(model: Any) -> Readout:
    """The last norm acts on all tokens; a merger makes the language model's tokens of groups of them."""
    unpooled = "its output is of every token, or of every group of tokens"
    ports: dict[str, Port | str] = {"pooled": unpooled, "logits": f"{type(model).__name__} has no head"}
    found = next((path for path in NORMS if _acts_on_tokens(model, path)), None)
    if hasattr(model, "ln_post"):
        ports["ln_final"] = "the last norm acts on tokens out of their windows; read the last resid_post"
    elif found is None:
        ports["ln_final"] = "it has no last norm on tokens; read the last resid_post"
    else:
        ports["ln_final"] = Port(found)
    pools = not any(hasattr(model, name) for name in ("ln", "ln_post"))
    return Readout("pooler_output" if pools else "last_hidden_state", ports)


def _acts_on_tokens(model: Any, path: str) -> bool:
    *parents, name = path.split(".")
    for parent in parents:
        model = getattr(model, parent, None)
    norm = getattr(model, name, None)
    # A norm behind the merge is as wide as a group of tokens.
    return isinstance(norm, nn.Module) and not getattr(model, "use_postshuffle_norm", False)


def no_layer(block: Any) -> str | None:
    """Why the inside of a block's MLP is not named."""
    plain = ("fc1", "linear_fc1", "gate_proj")
    if any(hasattr(block.mlp, name) for name in plain):
        return None
    return f"its MLP is a {type(block.mlp).__name__}, whose inside is not the same for all tokens"


def refuses(model: Any) -> str | None:
    """Other models around the same blocks."""
    return foreign_parts(model, PARTS)


QWEN_VL = Family(
    name="transformers.qwen_vl",
    library="transformers",
    blocks=("blocks", "layers"),
    attention="attn",
    out_projection="attn.proj",
    parts={"": BLOCK, "attn": ATTENTION},
    absent={"mlp.pre": no_layer, "mlp.pre_linear": no_layer, "mlp.post": no_layer},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("norm1"),),
        "attn_out": (Port("attn"),),
        "resid_mid": (Port("norm2", "input", in_place=True),),
        "ln2": (Port("norm2"),),
        "mlp.pre": (Port("mlp.fc1"), Port("mlp.linear_fc1"), Port("mlp.gate_proj")),
        "mlp.pre_linear": (Port("mlp.up_proj"),),
        "mlp.post": (
            Port("mlp.fc2", "input"),
            Port("mlp.linear_fc2", "input"),
            Port("mlp.down_proj", "input"),
        ),
        "mlp_out": (Port("mlp"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=readout,
    inputs=inputs,
    packing=packing,
    counts_rows=True,  # what merges tokens counts on the grids that went in
    refuses=refuses,
    any_size=lambda model: True,
)
