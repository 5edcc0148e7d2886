"""transformers' ViT, DeiT (with and without teacher), ViT-MSN, ViT-MAE, I-JEPA, Pixio, and ViViT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vit_mechinterp.adapters.transformers_readout import (
    base,
    d_model,
    grid_of,
    heads,
    prefix_of,
    readout,
    refusal,
    tubelets_of,
)
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

NAMES = ("vit", "deit", "ijepa", "vivit")
PARTS = frozenset({"embeddings", "layers", "layernorm", "pooler"})
BLOCK = frozenset({"layernorm_before", "attention", "layernorm_after", "mlp", "dropout", "drop_path"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


def tokens(model: Any) -> TokenLayout:
    """CLS (several in Pixio, none in I-JEPA), DeiT's distillation token, patches or tubelets."""
    prefix = prefix_of(base(model, *NAMES)[1].embeddings)
    if hasattr(model.config, "tubelet_size"):
        return tubelets_of(model.config, prefix)
    return grid_of(model, prefix)


def vit_readout(model: Any) -> Readout:
    """The final norm acts on all tokens."""
    prefix, inner = base(model, *NAMES)
    pools = getattr(model, "pooler", None) is not None or hasattr(inner.embeddings, "n_cls_tokens")
    return readout(model, Port(prefix + "layernorm"), pools=pools)


def in_order(embeddings: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """ViT-MAE shuffles its patches by random numbers, also in eval mode; rising numbers keep their order."""
    if not hasattr(embeddings, "random_masking"):
        return (x,), {}
    order = torch.arange(embeddings.patch_embeddings.num_patches, device=x.device, dtype=torch.float32)
    return (x,), {"noise": order.expand(len(x), -1)}


def masks(model: Any, embeddings: Any) -> str | None:
    """Masked autoencoders that mask."""
    if hasattr(embeddings, "random_masking") and model.config.mask_ratio != 0:
        return (
            f"it drops {model.config.mask_ratio:.0%} of its patches at random, also in eval mode; set "
            "config.mask_ratio = 0"
        )
    return None


def refuses(model: Any) -> str | None:
    """Masked autoencoders that mask, and other models around the same blocks."""
    return masks(model, base(model, *NAMES)[1].embeddings) or refusal(model, NAMES, PARTS, tokens(model))


VIT = Family(
    name="transformers.vit",
    library="transformers",
    blocks=("vit.layers", "deit.layers", "ijepa.layers", "vivit.layers", "layers"),
    attention="attention",
    out_projection="attention.o_proj",
    parts={"": BLOCK, "attention": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("layernorm_before"),),
        "attn_out": (Port("attention"),),
        "resid_mid": (Port("layernorm_after", "input", in_place=True),),
        "ln2": (Port("layernorm_after"),),
        "mlp.pre": (Port("mlp.fc1"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.fc2", "input"),),
        "mlp_out": (Port("mlp"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=vit_readout,
    inputs=lambda model, x: in_order(base(model, *NAMES)[1].embeddings, x),
    refuses=refuses,
)
