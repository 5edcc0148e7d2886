"""transformers' DINOv2, with and without registers; plain and gated MLPs."""

from __future__ import annotations

from typing import Any

from vit_mechinterp.adapters.transformers_readout import base, readout, refusal, size_of
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

NAMES = ("dinov2", "dinov2_with_registers")
PARTS = frozenset({"embeddings", "encoder", "layernorm"})
BLOCK = frozenset({"norm1", "attention", "layer_scale1", "norm2", "mlp", "layer_scale2", "drop_path"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


def tokens(model: Any) -> TokenLayout:
    """CLS, registers, patches."""
    registers = getattr(base(model, *NAMES)[1].embeddings, "register_tokens", None)
    height, width = size_of(model.config.image_size)
    patch = size_of(model.config.patch_size)
    return TokenLayout(
        prefix=("cls",) + ("registers",) * (0 if registers is None else registers.shape[1]),
        grid=(height // patch[0], width // patch[1]),
        patch_size=patch,
        image_size=(height, width),
    )


def dinov2_readout(model: Any) -> Readout:
    """The final norm acts on all tokens; the classifier reads CLS beside the mean of the patches."""
    return readout(model, Port(base(model, *NAMES)[0] + "layernorm"))


def refuses(model: Any) -> str | None:
    """Backbones and other models around the same blocks."""
    return refusal(model, NAMES, PARTS, tokens(model))


def d_model(model: Any) -> int:
    """Width of the residual stream."""
    return int(model.config.hidden_size)


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    return int(attention.num_attention_heads), int(attention.head_dim)


DINOV2 = Family(
    name="transformers.dinov2",
    library="transformers",
    blocks=("dinov2.encoder.layer", "dinov2_with_registers.encoder.layer", "encoder.layer"),
    attention="attention",
    out_projection="attention.o_proj",
    parts={"": BLOCK, "attention": ATTENTION},
    attention_scale=("layer_scale1.lambda1",),
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("norm1"),),
        "attn_out": (Port("layer_scale1"),),
        "resid_mid": (Port("norm2", "input", in_place=True),),
        "ln2": (Port("norm2"),),
        "mlp.pre": (Port("mlp.gate_proj"), Port("mlp.fc1")),
        "mlp.pre_linear": (Port("mlp.up_proj"),),
        "mlp.post": (Port("mlp.down_proj", "input"), Port("mlp.fc2", "input")),
        "mlp_out": (Port("layer_scale2"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=dinov2_readout,
    refuses=refuses,
    any_size=lambda model: True,  # positions are interpolated to whatever size comes
)
