"""torchvision's `VisionTransformer`: ViT-B, L and H with CLS, norms before attention and MLP.

Attention is torch's `nn.MultiheadAttention`, whose inside is computed by separate calls in blocks that are
tapped (`vit_mechinterp.model.multihead`). The dropout behind it puts out the increment of the stream.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vit_mechinterp.adapters.timm_vit import wrong_channels
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

PARTS = frozenset({"conv_proj", "class_token", "encoder", "heads"})
ENCODER = frozenset({"pos_embedding", "dropout", "layers", "ln"})
BLOCK = frozenset({"ln_1", "self_attention", "dropout", "ln_2", "mlp"})
ATTENTION = frozenset({"in_proj_weight", "in_proj_bias", "out_proj"})


def tokens(model: Any) -> TokenLayout:
    """CLS, patches; a convolutional stem keeps the patch size."""
    patch, image = int(model.patch_size), int(model.image_size)
    return TokenLayout(("cls",), (image // patch,) * 2, (patch, patch), (image, image))


def readout(model: Any) -> Readout:
    """The norm of all tokens, CLS, and the heads (with a layer of their own before the last, or none)."""
    ln_final = Port("encoder.ln")
    if isinstance(model.heads, nn.Identity):
        headless = "the model has no head"
        return Readout(None, {"ln_final": ln_final, "pooled": Port(""), "logits": headless}, "pooled")
    return Readout(None, {"ln_final": ln_final, "pooled": Port("heads", "input"), "logits": Port("")})


def d_model(model: Any) -> int:
    """Width of the residual stream."""
    return int(model.hidden_dim)


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    return int(attention.num_heads), int(attention.head_dim)


def refuses(model: Any) -> str | None:
    """Other models around the same blocks, and images of other than three channels."""
    for module, parts in ((model, PARTS), (model.encoder, ENCODER)):
        held = [name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
        foreign = ", ".join(repr(name) for name in held if name not in parts)
        if foreign:
            return f"{type(module).__name__} also holds {foreign}, unknown to this family"
    return wrong_channels(model)


VIT = Family(
    name="torchvision.vit",
    library="torchvision",
    blocks=("encoder.layers",),
    attention="self_attention",
    out_projection="self_attention.out_proj",
    parts={"": BLOCK, "self_attention": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("ln_1"),),
        "attn.result": (Port("self_attention.out_proj", "input", token_first=True),),
        "attn_out": (Port("dropout"),),
        "resid_mid": (Port("ln_2", "input", in_place=True),),
        "ln2": (Port("ln_2"),),
        "mlp.pre": (Port("mlp.0"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.3", "input"),),
        "mlp_out": (Port("mlp"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=readout,
    refuses=refuses,
)
