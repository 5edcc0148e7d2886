"""timm's vision tower of Gemma 4: norms before and behind attention and MLP, one drop path for both."""

from __future__ import annotations

from typing import Any

from vit_mechinterp.adapters.timm_encoder import classifier_readout, encoder_of
from vit_mechinterp.adapters.timm_vit import d_model
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

BLOCK = frozenset({"norm1", "attn", "norm2", "norm3", "mlp", "norm4", "drop_path"})
IMAGE_SIZE = (768, 768)


def tokens(model: Any) -> TokenLayout:
    """Patches alone. The tower takes images of any size; the pretrained configuration's is assumed."""
    patch = encoder_of(model)[1].patch_size
    configured = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, *IMAGE_SIZE))
    height, width = configured[-2:]
    return TokenLayout((), (height // patch[0], width // patch[1]), tuple(patch), (height, width))


def readout(model: Any) -> Readout:
    """Pooling to soft tokens, the mean, or the tokens themselves; no norm on the tokens."""
    ln_final = "no norm acts on the tokens behind the last block"
    if encoder_of(model)[0]:
        return classifier_readout(model, ln_final)
    headless = "the model has no head"
    if model.global_pool == "avg":
        return Readout(None, {"ln_final": ln_final, "pooled": Port(""), "logits": headless}, "pooled")
    ports = {"ln_final": ln_final, "pooled": "the model puts out tokens", "logits": headless}
    return Readout(None, ports, "soft_tokens" if model.global_pool == "soft" else "last_hidden_state")


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    return int(attention.num_heads), int(attention.head_dim)


GEMMA4 = Family(
    name="timm.gemma4",
    library="timm",
    blocks=("encoder.blocks", "blocks"),
    attention="attn",
    out_projection="attn.o_proj.linear",
    parts={"": BLOCK},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("norm1"),),
        "attn_out": (Port("drop_path", call=0, requires=(Port.has("norm4"),)),),
        "resid_mid": (Port("norm3", "input", in_place=True),),
        "ln2": (Port("norm3"),),
        "mlp.pre": (Port("mlp.gate_proj"),),
        "mlp.pre_linear": (Port("mlp.up_proj"),),
        "mlp.post": (Port("mlp.down_proj", "input"),),
        "mlp_out": (Port("drop_path", call=1),),
        "resid_post": (Port(""),),
    },
    absent={"attn.result": "a norm acts on the sum of the heads, so no head has an increment of its own"},
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=readout,
    any_size=lambda model: True,
)
