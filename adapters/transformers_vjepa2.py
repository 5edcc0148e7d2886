"""transformers' V-JEPA 2: video, rotary positions, blocks that return tuples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vit_mechinterp.adapters.transformers_readout import base, d_model, heads, size_of
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

NAMES = ("vjepa2",)
PARTS = frozenset({"encoder", "predictor"})
HEADS = frozenset({"vjepa2", "pooler", "classifier"})
BLOCK = frozenset({"norm1", "attention", "drop_path", "norm2", "mlp"})
ATTENTION = frozenset({"query", "key", "value", "proj", "dropout"})


def tokens(model: Any) -> TokenLayout:
    """Tubelets alone."""
    config = model.config
    height, width = size_of(config.crop_size)
    patch = size_of(config.patch_size)
    frames, depth = int(config.frames_per_clip), int(config.tubelet_size)
    return TokenLayout(
        prefix=(),
        grid=(frames // depth, height // patch[0], width // patch[1]),
        patch_size=patch,
        image_size=(height, width),
        frames=frames,
    )


def vjepa2_readout(model: Any) -> Readout:
    """The last norm acts on all tokens; the classifier pools them by attention."""
    ln_final = Port(base(model, *NAMES)[0] + "encoder.layernorm")
    if hasattr(model, "classifier"):
        ports: dict[str, Port | str] = {"pooled": Port("classifier", "input"), "logits": Port("classifier")}
        return Readout("logits", {"ln_final": ln_final, **ports})
    unpooled = f"{type(model).__name__} has no pooler"
    headless = f"{type(model).__name__} has no head"
    return Readout("last_hidden_state", {"ln_final": ln_final, "pooled": unpooled, "logits": headless})


def inputs(model: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The predictor is no part of the encoder's output, and costs as much again."""
    return (x,), {} if hasattr(model, "classifier") else {"skip_predictor": True}


def refuses(model: Any) -> str | None:
    """Other models around the same blocks."""
    inner = base(model, *NAMES)[1]
    allowed = {id(model): HEADS if hasattr(model, "classifier") else PARTS, id(inner): PARTS}
    if inner is model and hasattr(model, "classifier"):
        return "it has a classifier of its own"
    for module in dict.fromkeys((model, inner)):
        held = {name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))}
        if foreign := ", ".join(map(repr, sorted(held - allowed[id(module)]))):
            return f"{type(module).__name__} also holds {foreign}, unknown to this family"
    return None


VJEPA2 = Family(
    name="transformers.vjepa2",
    library="transformers",
    blocks=("vjepa2.encoder.layer", "encoder.layer"),
    attention="attention",
    out_projection="attention.proj",
    parts={"": BLOCK, "attention": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("norm1"),),
        "attn_out": (Port("drop_path", call=0),),
        "resid_mid": (Port("norm2", "input", in_place=True),),
        "ln2": (Port("norm2"),),
        "mlp.pre": (Port("mlp.fc1"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.fc2", "input"),),
        "mlp_out": (Port("drop_path", call=1),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=vjepa2_readout,
    returns_tuple=True,
    inputs=inputs,
    refuses=refuses,
)
