"""transformers' vision towers in the style of CLIP and SigLIP: ``self_attn`` between ``layer_norm1`` and 2.

CLIP and its relatives (MetaCLIP 2, AltCLIP, Chinese-CLIP, MLCD, OWL-ViT, OWLv2, Kosmos-2, the tower of
CLIPSeg) norm CLS alone at the end; SigLIP and its relatives (SigLIP 2, Idefics 2 and 3, SmolVLM, GIT, Janus,
Phi-4 multimodal) norm all tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vit_mechinterp.adapters.transformers_readout import (
    base,
    config_of,
    d_model,
    grid_of,
    heads,
    prefix_of,
    readout,
    refusal,
    returns_tuple,
)
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

NAMES = ("vision_model", "model")
PRE_NORMS = ("pre_layrnorm", "pre_layernorm")  # the first is transformers' own spelling
CLIP_PARTS = frozenset({"embeddings", *PRE_NORMS, "encoder", "post_layernorm"})
MLCD_PARTS = frozenset({"embeddings", "vision_rotary_embedding", "class_pos_emb", "pre_layrnorm", "encoder"})
SIGLIP_PARTS = frozenset({"embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head"})
BLOCK = frozenset({"layer_norm1", "self_attn", "layer_norm2", "mlp"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "out_proj"})
JANUS_ATTENTION = frozenset(
    {"q_proj", "k_proj", "v_proj", "projection_layer", "projection_dropout", "q_norm", "k_norm"}
)
NORM_ALL = ("GitVisionTransformer",)
"""Classes built like CLIP's whose last norm acts on all tokens; nothing that they hold tells it."""


def clip_tokens(model: Any) -> TokenLayout:
    """CLS, patches."""
    return grid_of(model, prefix_of(base(model, *NAMES)[1].embeddings))


def _norms_all(model: Any) -> bool:
    """Whether the last norm acts on all tokens: always where there is no CLS to pool."""
    inner = base(model, *NAMES)[1]
    return not prefix_of(inner.embeddings) or type(inner).__name__ in NORM_ALL


def clip_readout(model: Any) -> Readout:
    """``post_layernorm`` acts on CLS alone, and the classifier's mean of patches is not normed at all."""
    return readout(
        model, "its last norm acts on CLS alone, after pooling; read pooled, or the last resid_post"
    )


def clip_refuses(model: Any) -> str | None:
    """Two towers in one module have two inputs; towers that norm all tokens are SigLIP's relatives."""
    if hasattr(model, "text_model"):
        return "it also holds a text tower; wrap its vision_model"
    if not any(hasattr(base(model, *NAMES)[1], name) for name in PRE_NORMS):
        return f"it has no {' or '.join(map(repr, PRE_NORMS))}"
    if _norms_all(model):
        return "its last norm acts on all tokens"
    return refusal(model, NAMES, CLIP_PARTS, clip_tokens(model))


CLIP = Family(
    name="transformers.clip",
    library="transformers",
    blocks=("vision_model.encoder.layers", "model.encoder.layers", "encoder.layers"),
    attention="self_attn",
    out_projection="self_attn.out_proj",
    parts={"": BLOCK, "self_attn": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("layer_norm1"),),
        "attn_out": (Port("self_attn"),),
        "resid_mid": (Port("layer_norm2", "input", in_place=True),),
        "ln2": (Port("layer_norm2"),),
        "mlp.pre": (Port("mlp.fc1"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.fc2", "input"),),
        "mlp_out": (Port("mlp"),),
        "resid_post": (Port(""),),
    },
    tokens=clip_tokens,
    d_model=d_model,
    heads=heads,
    readout=clip_readout,
    returns_tuple=returns_tuple,
    refuses=clip_refuses,
)


def mlcd_refuses(model: Any) -> str | None:
    """Models that hold more than the tower."""
    if not hasattr(base(model, *NAMES)[1], "class_pos_emb"):
        return "it has no 'class_pos_emb'"
    return refusal(model, NAMES, MLCD_PARTS | {"post_layernorm"}, clip_tokens(model))


MLCD = dataclasses.replace(
    CLIP,
    name="transformers.mlcd",
    ports={**CLIP.ports, "attn.result": (Port("self_attn.out_proj", "input", token_first=True),)},
    refuses=mlcd_refuses,
)


def takes_patches(model: Any) -> bool:
    """Whether the model takes flattened patches in place of images (SigLIP 2)."""
    return hasattr(base(model, *NAMES)[1].embeddings, "position_embedding_size")


def siglip_tokens(model: Any) -> TokenLayout:
    """Patches alone, except in GIT."""
    if not takes_patches(model):
        return clip_tokens(model)
    config = config_of(model)
    side, patch = int(config.num_patches**0.5), int(config.patch_size)
    return TokenLayout((), (side, side), (patch, patch), (side * patch, side * patch))


def siglip_readout(model: Any) -> Readout:
    """``post_layernorm`` acts on all tokens, an attention head pools them."""
    prefix, inner = base(model, *NAMES)
    return readout(model, Port(prefix + "post_layernorm"), pools=hasattr(inner, "head"))


def siglip_inputs(model: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """SigLIP 2 takes flattened patches, a mask where some are none, and the grid's height and width."""
    if not takes_patches(model):
        return (x,), {}
    side = int(config_of(model).patch_size)
    rows, columns = x.shape[2] // side, x.shape[3] // side
    patches = x.reshape(len(x), x.shape[1], rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
    shapes = torch.tensor([[rows, columns]] * len(x), device=x.device)
    return (patches.reshape(len(x), rows * columns, -1), None, shapes), {}


def masks_its_pool(model: Any) -> bool:
    """Whether the pooling head is given a padding mask with one row per image (Phi-4 multimodal)."""
    inner = base(model, *NAMES)[1]
    return hasattr(inner, "head") and hasattr(inner.embeddings, "num_patches_per_side")


def phi4_refuses(model: Any) -> str | None:
    """Models whose pooling head takes any number of rows."""
    if not masks_its_pool(model):
        return "its pooling head has no mask"
    return refusal(model, NAMES, SIGLIP_PARTS, siglip_tokens(model))


def siglip_refuses(model: Any) -> str | None:
    """Two towers in one module have two inputs."""
    if hasattr(model, "text_model"):
        return "it also holds a text tower; wrap its vision_model"
    if not _norms_all(model):
        return "its last norm acts on CLS alone"
    if masks_its_pool(model):
        return "its pooling head masks as many rows as images went in"
    return refusal(model, NAMES, SIGLIP_PARTS, siglip_tokens(model))


def janus_readout(model: Any) -> Readout:
    """``post_layernorm`` acts on all tokens, and once more on a pooled vector that is made of them."""
    return readout(model, Port(base(model, *NAMES)[0] + "post_layernorm", call=0))


SIGLIP = dataclasses.replace(
    CLIP,
    name="transformers.siglip",
    tokens=siglip_tokens,
    readout=siglip_readout,
    inputs=siglip_inputs,
    refuses=siglip_refuses,
)

JANUS = dataclasses.replace(
    SIGLIP,
    name="transformers.janus",
    out_projection="self_attn.projection_layer",
    parts={"": BLOCK, "self_attn": JANUS_ATTENTION},
    ports={
        **CLIP.ports,
    },
    readout=janus_readout,
)

PHI4 = dataclasses.replace(SIGLIP, name="transformers.phi4", refuses=phi4_refuses, counts_rows=True)
