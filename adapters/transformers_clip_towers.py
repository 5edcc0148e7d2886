"""Towers of vision-language models with the blocks of CLIP, image by image: Molmo 2, Granite-Docling."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from vit_mechinterp.adapters.transformers_clip import CLIP, SIGLIP
from vit_mechinterp.adapters.transformers_packed import patches_of
from vit_mechinterp.adapters.transformers_readout import config_of, grid_of, size_of
from vit_mechinterp.model.layout import Port, Readout, TokenLayout

MOLMO_PARTS = frozenset({"positional_embedding", "patch_embedding", "layers"})
MOLMO_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
GRANITE_PARTS = frozenset({"embeddings", "encoder", "post_layernorm", "connector"})


def tokens(model: Any) -> TokenLayout:
    """Patches alone."""
    return grid_of(model, ())


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    return int(attention.q_proj.out_features // attention.head_dim), int(attention.head_dim)


def molmo_inputs(model: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Patches row by row, channels last."""
    patches, _ = patches_of(x, size_of(config_of(model).patch_size), 1)
    return (patches.permute(0, 2, 3, 1).reshape(len(x), -1, patches[0].numel()),), {}


def molmo_readout(model: Any) -> Readout:
    """The mean of the last residual stream; there is no last norm."""
    unnormed = "it has no last norm; read the last resid_post"
    ports: dict[str, Port | str] = {"ln_final": unnormed, "pooled": Port("", field="pooler_output")}
    return Readout("pooler_output", {**ports, "logits": f"{type(model).__name__} has no head"})


def granite_readout(model: Any) -> Readout:
    """The last norm acts on all tokens; a connector mixes them for the language model."""
    ports: dict[str, Port | str] = {"ln_final": Port("post_layernorm")}
    for site in ("pooled", "logits"):
        ports[site] = "a connector makes the language model's tokens of groups; read ln_final"
    return Readout("last_hidden_state", ports)


def _others(model: Any, parts: frozenset[str]) -> str | None:
    """Other models around the same blocks."""
    held = {name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    wrong = sorted(held ^ parts)
    return f"it differs from this family in {', '.join(map(repr, wrong))}" if wrong else None


MOLMO2 = dataclasses.replace(
    CLIP,
    name="transformers.molmo2",
    blocks=("layers",),
    out_projection="self_attn.o_proj",
    parts={**CLIP.parts, "self_attn": MOLMO_ATTENTION},
    tokens=tokens,
    heads=heads,
    readout=molmo_readout,
    inputs=molmo_inputs,
    refuses=lambda model: _others(model, MOLMO_PARTS),
)

GRANITE_DOCLING = dataclasses.replace(
    SIGLIP,
    name="transformers.granite_docling",
    blocks=("encoder.layers",),
    tokens=tokens,
    readout=granite_readout,
    inputs=lambda model, x: ((x,), {}),
    refuses=lambda model: _others(model, GRANITE_PARTS),
    any_size=lambda model: False,
)
