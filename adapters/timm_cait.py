"""timm's CaiT: talking-heads attention over the patches, then a class token that only reads them.

Talking heads mix between heads on both sides of the softmax: ``attn.scores`` are the mixed logits that enter
it, ``attn.pattern`` is what comes out of it, and a linear map over the heads stands between the pattern and
``attn.z``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vit_mechinterp.adapters.timm_vit import VIT, wrong_channels
from vit_mechinterp.model.layout import Port, Readout, TokenLayout

BLOCK = frozenset({"norm1", "attn", "drop_path", "norm2", "mlp", "gamma_1", "gamma_2"})
ATTENTION = frozenset({"qkv", "attn_drop", "proj", "proj_l", "proj_w", "proj_drop"})


def tokens(model: Any) -> TokenLayout:
    """Patches alone: the class token joins behind the last block."""
    patches = model.patch_embed
    patch = patches.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    image = tuple(patches.img_size)
    return TokenLayout((), (image[0] // height, image[1] // width), (height, width), image)


def readout(model: Any) -> Readout:
    """Blocks in which the class token reads the patches, a norm, that token or the mean, a linear layer."""
    ln_final = (
        "the class token joins behind the last block, so the last norm acts on other tokens than the blocks"
    )
    ports: dict[str, Port | str] = {"ln_final": ln_final, "pooled": Port("head", "input"), "logits": Port("")}
    if not model.global_pool:
        unpooled = "the model is made without pooling"
        return Readout(None, {**ports, "pooled": unpooled, "logits": unpooled}, "features of every token")
    if isinstance(model.head, nn.Identity):
        return Readout(None, {**ports, "pooled": Port(""), "logits": "the model has no head"}, "pooled")
    return Readout(None, ports)


def mixing(attention: Any, pattern: Tensor) -> Tensor:
    """The linear map over heads behind the softmax."""
    mixed: Tensor = attention.proj_w(pattern.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return mixed


CAIT = replace(
    VIT,
    name="timm.cait",
    attention_scale=("gamma_1",),
    parts={"": BLOCK, "attn": ATTENTION},
    ports={
        **VIT.ports,
        "ln1": (Port("norm1", requires=(Port.has("attn.proj_l"),)),),
        "attn_out": (Port("drop_path", call=0),),
        "mlp_out": (Port("drop_path", call=1),),
    },
    tokens=tokens,
    readout=readout,
    mixing=mixing,
    refuses=wrong_channels,
    any_size=lambda model: False,
)
