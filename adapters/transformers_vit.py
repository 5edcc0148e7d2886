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
)
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

NAMES = ("vit", "deit", "ijepa", "vivit")
PARTS = frozenset({"embeddings", "layers", "layernorm", "pooler"})
BLOCK = frozenset({"layernorm_before", "attention", "layernorm_after", "mlp", "dropout", "drop_path"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


def tokens(model: Any) -> TokenLayout:
    """CLS (several in Pixio, none in I-JEPA), DeiT's distillation token, patches or tubelets."""
    prefix = prefix_of(base(model, *NAMES)[1].embeddings)
    tubelet = getattr(model.config, "tubelet_size", None)
    if tubelet is None:
        return grid_of(model, prefix)
    depth, height, width = tubelet
    image = int(model.config.image_size)
    return TokenLayout(
        prefix=prefix,
        grid=(model.config.num_frames // depth, image // height, image // width),
        patch_size=(height, width),
        image_size=(image, image),
        frames=int(model.config.num_frames),
    )


def vit_readout(model: Any) -> Readout:
    """The final norm acts on all tokens."""
    prefix, inner = base(model, *NAMES)
    pools = getattr(model, "pooler", None) is not None or hasattr(inner.embeddings, "n_cls_tokens")
    return readout(model, Port(prefix + "layernorm"), pools=pools)


def inputs(model: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """ViT-MAE shuffles its patches by random numbers, also in eval mode; rising numbers keep their order."""
    embeddings = base(model, *NAMES)[1].embeddings
    if not hasattr(embeddings, "random_masking"):
        return (x,), {}
    order = torch.arange(embeddings.patch_embeddings.num_patches, device=x.device, dtype=torch.float32)
    return (x,), {"noise": order.expand(len(x), -1)}


def refuses(model: Any) -> str | None:
    """Masked autoencoders that mask, and other models around the same blocks."""
    if hasattr(base(model, *NAMES)[1].embeddings, "random_masking") and model.config.mask_ratio != 0:
        return (
            f"it drops {model.config.mask_ratio:.0%} of its patches at random, also in eval mode; set "
            "config.mask_ratio = 0"
        )
    return refusal(model, NAMES, PARTS, tokens(model))


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
    inputs=inputs,
    refuses=refuses,
)
