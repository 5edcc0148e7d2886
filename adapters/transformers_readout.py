"""What transformers' families share: outputs, and the classes that do something else with the same blocks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from vit_mechinterp.model.layout import Port, Readout, TokenLayout

HEADS = {"classifier", "cls_classifier", "distillation_classifier", "visual_projection"}


def readout(model: Any, ln_final: Port | str, *, pools: bool = True) -> Readout:
    """Read the output off a model's own head.

    The first of these that the class computes is its output: logits, image embeddings, the pooler's output,
    the last hidden state. ``pools`` says whether the bare model's output has a ``pooler_output``.
    """
    if hasattr(model, "cls_classifier"):
        reason = "two heads read two tokens; read ln_final"
        return Readout("logits", {"ln_final": ln_final, "pooled": reason, "logits": Port("", field="logits")})
    for head, output in (("classifier", "logits"), ("visual_projection", "image_embeds")):
        if hasattr(model, head):
            ports = {"ln_final": ln_final, "pooled": Port(head, "input"), "logits": Port("", field=output)}
            return Readout(output, ports)
    headless = f"{type(model).__name__} has no head"
    if not pools:
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


def refusal(model: Any, names: Collection[str], parts: Collection[str], layout: TokenLayout) -> str | None:
    """Why a class whose blocks look right computes something else around them; None if it does not.

    Args:
        model: the model.
        names: attributes under which a model with a head holds the bare one.
        parts: the submodules and parameters that a bare model may hold.
        layout: the tokens that the family sees in the model.
    """
    inner = base(model, *names)[1]
    allowed = {id(model): {*names, *HEADS}, id(inner): {*parts}}
    if inner is model:
        allowed = {id(model): {*parts, *HEADS}}
    for module in dict.fromkeys((model, inner)):
        held = [name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
        foreign = [name for name in held if name not in allowed[id(module)]]
        if foreign:
            return (
                f"{type(module).__name__} also holds {', '.join(map(repr, foreign))}, unknown to this family"
            )
    if hasattr(model, "out_features"):
        return "it is a backbone that gives several feature maps; wrap the model class of the same weights"
    if hasattr(inner.embeddings, "random_masking"):
        return "it drops patches at random, also in eval mode"
    if not getattr(model, "_supports_sdpa", False):
        return "its attention does not call scaled_dot_product_attention"
    if getattr(vision_config(model), "num_channels", 3) != 3:
        return f"it takes images of {vision_config(model).num_channels} channels, and images have 3"
    if not getattr(model.config, "return_dict", True):
        return "config.return_dict is False; set it to True"
    positions = positions_of(inner.embeddings)
    embedded = layout.n_tokens - layout.prefix.count("registers")
    if positions is not None and positions != embedded:
        return f"it has {positions} position embeddings, and {embedded} tokens would be expected ({layout})"
    return None


def vision_config(model: Any) -> Any:
    """The configuration that describes the vision tower."""
    return getattr(model.config, "vision_config", model.config)


def positions_of(embeddings: Any) -> int | None:
    """Number of learned positions; registers have none."""
    table = getattr(embeddings, "position_embeddings", None)
    if table is not None:
        return int(table.shape[1])
    return getattr(getattr(embeddings, "position_embedding", None), "num_embeddings", None)


def size_of(value: Any) -> tuple[int, int]:
    """A configuration's size, given as a number or as height and width."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
