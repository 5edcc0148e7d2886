"""How transformers' ViT classes turn their last residual stream into an output; shared by its families."""

from __future__ import annotations

from typing import Any

from torch import nn

from vit_mechinterp.model.layout import Port, Readout


def readout(model: Any, ln_final: Port | str) -> Readout:
    """Read the output off a model's own head.

    The first of these that the class computes is its output: logits, image embeddings, the pooler's output,
    the last hidden state.
    """
    if hasattr(model, "cls_classifier"):
        reason = "two heads read two tokens; read ln_final"
        return Readout("logits", {"ln_final": ln_final, "pooled": reason, "logits": Port("", field="logits")})
    for head, output in (("classifier", "logits"), ("visual_projection", "image_embeds")):
        if hasattr(model, head):
            ports = {"ln_final": ln_final, "pooled": Port(head, "input"), "logits": Port("", field=output)}
            return Readout(output, ports)
    headless = f"{type(model).__name__} has no head"
    if getattr(model, "pooler", True) is None:
        unpooled = f"{type(model).__name__} has no pooler"
        return Readout("last_hidden_state", {"ln_final": ln_final, "pooled": unpooled, "logits": headless})
    pooled = Port("", field="pooler_output")
    return Readout("pooler_output", {"ln_final": ln_final, "pooled": pooled, "logits": headless})


def base(model: Any, *names: str) -> tuple[str, Any]:
    """The path prefix and the module of the bare ViT inside a model with a head (or of the model itself)."""
    for name in names:
        if isinstance(getattr(model, name, None), nn.Module):
            return f"{name}.", getattr(model, name)
    return "", model


def size_of(value: Any) -> tuple[int, int]:
    """A configuration's size, given as a number or as height and width."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
