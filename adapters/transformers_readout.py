"""What transformers' families share: outputs, and the classes that do something else with the same blocks."""

from __future__ import annotations

import inspect
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
    if getattr(config_of(model), "num_channels", 3) != 3:
        return f"it takes images of {config_of(model).num_channels} channels, and images have 3"
    if not getattr(model.config, "return_dict", True):
        return "config.return_dict is False; set it to True"
    positions = positions_of(inner.embeddings)
    embedded = layout.n_tokens - layout.prefix.count("registers")
    # Some embed the patches alone, some have a position for a CLS that they do not use.
    if positions is not None and positions not in (embedded, layout.n_patches, layout.n_patches + 1):
        return f"it has {positions} position embeddings, and {embedded} tokens would be expected ({layout})"
    return None


def positions_of(embeddings: Any) -> int | None:
    """Number of learned positions; registers have none. None where they are interpolated or cut to size."""
    if hasattr(embeddings, "max_rows"):
        return None
    table = getattr(embeddings, "position_embeddings", getattr(embeddings, "position_embedding", None))
    if isinstance(table, nn.Embedding):
        return table.num_embeddings
    return None if table is None else int(table.shape[1])


def config_of(model: Any) -> Any:
    """The configuration of the vision part."""
    return getattr(model.config, "vision_config", model.config)


def d_model(model: Any) -> int:
    """Width of the residual stream."""
    return int(config_of(model).hidden_size)


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    names = ("num_attention_heads", "num_heads")
    count = next(int(getattr(attention, name)) for name in names if hasattr(attention, name))
    width = getattr(attention, "head_dim", getattr(attention, "attention_head_size", None))
    if width is None:
        width = attention.qkv.out_features // (3 * count)
    return count, int(width)


def grid_of(
    model: Any,
    prefix: tuple[str, ...],
    suffix: tuple[str, ...] = (),
    *,
    frames: tuple[int, int] | None = None,
) -> TokenLayout:
    """The token layout for the image and patch size of the configuration.

    ``frames`` is the number of frames of a video and the number of frames that one patch spans.
    """
    config = config_of(model)
    height, width = size_of(config.image_size)
    patch = size_of(config.patch_size)
    grid = (height // patch[0], width // patch[1])
    return TokenLayout(
        prefix=prefix,
        grid=grid if frames is None else (frames[0] // frames[1], *grid),
        patch_size=patch,
        image_size=(height, width),
        suffix=suffix,
        frames=None if frames is None else frames[0],
    )


def tubelets_of(config: Any, prefix: tuple[str, ...]) -> TokenLayout:
    """The token layout of a video model whose configuration gives a tubelet's frames, height and width."""
    depth, height, width = config.tubelet_size
    image = int(config.image_size)
    return TokenLayout(
        prefix=prefix,
        grid=(config.num_frames // depth, image // height, image // width),
        patch_size=(height, width),
        image_size=(image, image),
        frames=int(config.num_frames),
    )


def prefix_of(embeddings: Any) -> tuple[str, ...]:
    """CLS, distillation token and registers, as the embeddings hold and concatenate them."""
    cls = next(
        (t for n in ("cls_token", "class_embedding") if (t := getattr(embeddings, n, None)) is not None), None
    )
    prefix = () if cls is None else ("cls",) * (1 if cls.ndim == 1 else int(cls.shape[1]))
    if getattr(embeddings, "distillation_token", None) is not None:
        prefix += ("distillation",)
    registers = getattr(embeddings, "register_tokens", None)
    return prefix + ("registers",) * (0 if registers is None else int(registers.shape[1]))


def returns_tuple(block: nn.Module) -> bool:
    """Whether a block returns a tuple, as those of transformers 4 do that can give out attention weights."""
    return "output_attentions" in inspect.signature(type(block).forward).parameters


def size_of(value: Any) -> tuple[int, int]:
    """A configuration's size, given as a number or as height and width."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
