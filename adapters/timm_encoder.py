"""timm's vision towers of Qwen3-VL and DeepSeek: an encoder, alone or inside a classifier."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from vit_mechinterp.adapters.timm_vit import VIT, wrong_channels
from vit_mechinterp.model.layout import Port, Readout, TokenLayout

PARTS = frozenset({"patch_embed", "pos_embed", "rope", "blocks", "norm", "merger", "aligner"})


def encoder_of(model: Any) -> tuple[str, Any]:
    """The path prefix and the module of the encoder inside a classifier (or of the model itself)."""
    return ("encoder.", model.encoder) if hasattr(model, "encoder") else ("", model)


def tokens(model: Any) -> TokenLayout:
    """Patches alone."""
    patches = encoder_of(model)[1].patch_embed
    return TokenLayout((), tuple(patches.grid_size), tuple(patches.patch_size), tuple(patches.img_size))


def classifier_readout(model: Any, ln_final: Port | str) -> Readout:
    """Mean of the encoder's output, a norm, a linear layer (or none)."""
    headless = isinstance(model.head, nn.Identity)
    if model.global_pool != "avg":
        unpooled = "the model is made without pooling"
        name = "features of every token" if headless else "logits of every token"
        return Readout(None, {"ln_final": ln_final, "pooled": unpooled, "logits": unpooled}, name)
    if headless:
        return Readout(
            None, {"ln_final": ln_final, "pooled": Port(""), "logits": "the model has no head"}, "pooled"
        )
    return Readout(None, {"ln_final": ln_final, "pooled": Port("head", "input"), "logits": Port("")})


def readout(model: Any) -> Readout:
    """A norm (DeepSeek), then the projector into the language model, the mean, or the tokens themselves."""
    prefix, encoder = encoder_of(model)
    ln_final: Port | str = "no norm acts on the tokens behind the last block"
    if hasattr(encoder, "norm"):
        ln_final = Port(f"{prefix}norm")
    if prefix:
        return classifier_readout(model, ln_final)
    headless = "the model has no head"
    if encoder.global_pool == "avg":
        return Readout(None, {"ln_final": ln_final, "pooled": Port(""), "logits": headless}, "pooled")
    ports = {"ln_final": ln_final, "pooled": "the model puts out tokens", "logits": headless}
    return Readout(None, ports, "projected_tokens" if encoder.global_pool else "last_hidden_state")


def refuses(model: Any) -> str | None:
    """Other models around the same blocks, and images of other than three channels."""
    encoder = encoder_of(model)[1]
    held = [name for name, _ in (*encoder.named_children(), *encoder.named_parameters(recurse=False))]
    foreign = ", ".join(repr(name) for name in held if name not in PARTS)
    if foreign:
        return f"{type(encoder).__name__} also holds {foreign}, unknown to this family"
    return wrong_channels(model)


ENCODER = replace(
    VIT,
    name="timm.encoder",
    blocks=("encoder.blocks", "blocks"),
    tokens=tokens,
    readout=readout,
    refuses=refuses,
    counts_rows=True,
    any_size=lambda model: True,
)
