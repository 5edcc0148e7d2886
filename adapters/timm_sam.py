"""timm's `VisionTransformerSAM`: the stream is an image, and most blocks attend within windows.

The decomposed relative position bias is made from the queries before the attention call, so an edit of
``attn.q`` changes the dot product and leaves the bias.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vit_mechinterp.adapters.timm_vit import VIT, d_model, heads, wrong_channels
from vit_mechinterp.model.layout import Difference, Family, Port, Readout, TokenLayout

BLOCK = frozenset({"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"})
ATTENTION = frozenset(
    {"qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop", "rel_pos_h", "rel_pos_w", "rope"}
)


def tokens(model: Any) -> TokenLayout:
    """Patches alone."""
    patches = model.patch_embed
    return TokenLayout((), tuple(patches.grid_size), tuple(patches.patch_size), tuple(patches.img_size))


def readout(model: Any) -> Readout:
    """A neck of convolutions (or none), pooling, a linear layer (or none)."""
    ports: dict[str, Port | str] = {
        "ln_final": "no norm acts on the tokens behind the last block: the neck is made of convolutions",
        "pooled": Port("head.fc", "input"),
        "logits": Port(""),
    }
    if not isinstance(model.head.fc, nn.Linear):
        ports |= {"pooled": Port(""), "logits": "the model has no head"}
        return Readout(None, ports, "pooled")
    return Readout(None, ports)


def in_windows(block: Any) -> str | None:
    """Why a block that attends within windows has no attention sites over all tokens."""
    if block.window_size == 0:
        return None
    return f"this block attends within windows of {block.window_size} x {block.window_size} tokens, padded"


SAM = Family(
    name="timm.sam",
    library="timm",
    blocks=("blocks",),
    attention="attn",
    out_projection="attn.proj",
    attention_scale=("ls1.gamma",),
    parts={"": BLOCK, "attn": ATTENTION},
    ports={
        "resid_pre": (Port("", "input", spatial=True, requires=(Port.has("window_size"),)),),
        "ln1": (Port("norm1", spatial=True),),
        "attn_out": (
            Port("drop_path1", spatial=True, requires=(Port.has("window_size", 0),)),
            Difference("resid_mid", "resid_pre"),
        ),
        **{
            site: VIT.ports[site]
            for site in ("resid_mid", "ln2", "mlp.pre", "mlp.pre_linear", "mlp.post", "mlp_out")
        },
        "resid_post": (Port("", spatial=True),),
    },
    absent={f"attn.{site}": in_windows for site in ("q", "k", "v", "scores", "pattern", "z", "result")},
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=readout,
    refuses=wrong_channels,
)
