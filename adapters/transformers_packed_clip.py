"""Towers of vision-language models with the blocks of CLIP: ``self_attn`` between ``layer_norm1`` and 2.

PaddleOCR-VL, VideoLLaMA 3, MiniMax M3 VL, Cosmos 3 Edge, HunYuan-VL; and Inkling 2, whose images begin with
CLS and whose LayerScale is a bare parameter. They differ in the order of the patches that they take.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from vit_mechinterp.adapters.transformers_clip import CLIP
from vit_mechinterp.adapters.transformers_internvl import INTERNVL
from vit_mechinterp.adapters.transformers_packed import (
    foreign_parts,
    frames_of,
    merge_of,
    packing_of,
    patches_of,
    repeated,
    tokens_of,
)
from vit_mechinterp.adapters.transformers_readout import size_of
from vit_mechinterp.model.layout import Packing, Port, Readout, TokenLayout

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "o_proj"})
PARTS = frozenset({"embeddings", "encoder", "post_layernorm", "rotary_pos_emb"})
MINIMAX_PARTS = frozenset({"embeddings", "pre_layrnorm", "layers", "rotary_emb"})
HUNYUAN_PARTS = frozenset({"embeddings", "layers", "patch_merger"})
INKLING_PARTS = frozenset({"embeddings", "pre_layernorm", "rotary_emb", "layers", "merger"})

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def edge_of(model: Any) -> tuple[int, int]:
    """Size of a patch."""
    return size_of(model.config.patch_size)


def readout(model: Any, ln_final: Port | str, output: str = "last_hidden_state") -> Readout:
    """The output is of every token, or of every group of tokens."""
    unpooled = "its output is of every token, or of every group of tokens"
    ports = {"ln_final": ln_final, "pooled": unpooled, "logits": f"{type(model).__name__} has no head"}
    return Readout(output, ports)


def tokens(model: Any) -> TokenLayout:
    """Patches alone."""
    return tokens_of(model, merge_of(model))


def row_major(model: Any, layout: TokenLayout) -> Packing:
    """Patches come row by row, and all are put out."""
    return packing_of(model, layout, 1)


def paddle_inputs(model: Any, x: Tensor) -> Inputs:
    """All patches in one row of a batch."""
    patches, grid = patches_of(x, edge_of(model), 1)
    return (patches[None], grid), {}


def paddle_refuses(model: Any) -> str | None:
    """Other models around the same blocks."""
    if reason := foreign_parts(model, frozenset({"vision_model"})):
        return reason
    held = {name for name, _ in model.vision_model.named_children()}
    foreign = ", ".join(map(repr, sorted(held - PARTS)))
    return f"its vision_model also holds {foreign}, unknown to this family" if foreign else None


PADDLE_OCR = dataclasses.replace(
    CLIP,
    name="transformers.paddleocr_vl",
    blocks=("vision_model.encoder.layers",),
    parts={**CLIP.parts, "self_attn": ATTENTION},
    tokens=tokens,
    readout=lambda model: readout(model, Port("vision_model.post_layernorm")),
    inputs=paddle_inputs,
    packing=row_major,
    counts_rows=True,
    refuses=paddle_refuses,
    any_size=lambda model: True,
)


def video_llama_inputs(model: Any, x: Tensor) -> Inputs:
    """Images are not merged, unlike the frames of a video."""
    patches, grid = patches_of(x, edge_of(model), 1)
    return (patches.flatten(1), grid, torch.ones(len(x), dtype=torch.long, device=x.device)), {}


def video_llama_refuses(model: Any) -> str | None:
    """Other models around the same blocks."""
    if not isinstance(getattr(model.embeddings, "patch_embedding", None), nn.Conv2d):
        return "its patches are embedded by no convolution"
    return foreign_parts(model, PARTS)


VIDEO_LLAMA = dataclasses.replace(
    PADDLE_OCR,
    name="transformers.video_llama_3",
    blocks=("encoder.layers",),
    readout=lambda model: readout(model, Port("post_layernorm")),
    inputs=video_llama_inputs,
    refuses=video_llama_refuses,
)


def by_groups(model: Any, layout: TokenLayout) -> Packing:
    """Patches come in groups, and all are put out."""
    return packing_of(model, layout, merge_of(model))


def cosmos_inputs(model: Any, x: Tensor) -> Inputs:
    """Channels come last in a patch."""
    patches, grid = patches_of(x, edge_of(model), merge_of(model))
    return (patches.permute(0, 2, 3, 1).flatten(1), grid), {}


def cosmos_refuses(model: Any) -> str | None:
    """Other models around the same blocks."""
    if not isinstance(getattr(model.embeddings, "patch_embedding", None), nn.Linear):
        return "its patches are embedded by no linear layer"
    return foreign_parts(model, PARTS)


COSMOS_EDGE = dataclasses.replace(
    PADDLE_OCR,
    name="transformers.cosmos3_edge",
    blocks=("encoder.layers",),
    readout=lambda model: readout(model, Port("post_layernorm"), "pooler_output"),
    inputs=cosmos_inputs,
    packing=by_groups,
    refuses=cosmos_refuses,
)


def minimax_inputs(model: Any, x: Tensor) -> Inputs:
    """Patches in groups, repeated for every frame that the projection takes."""
    patches, grid = patches_of(x, edge_of(model), merge_of(model))
    return (repeated(patches, frames_of(model.embeddings.proj)), grid), {}


MINIMAX = dataclasses.replace(
    PADDLE_OCR,
    name="transformers.minimax_m3_vl",
    blocks=("layers",),
    readout=lambda model: readout(model, "it has no last norm; read the last resid_post"),
    inputs=minimax_inputs,
    packing=lambda model, layout: packing_of(model, layout, merge_of(model), leading=True),
    refuses=lambda model: foreign_parts(model, MINIMAX_PARTS),
)


def hunyuan_tokens(model: Any) -> TokenLayout:
    """Patches alone, at least two groups of them each way."""
    return tokens_of(model, 2 * int(model.config.spatial_merge_size))


def hunyuan_packing(model: Any, layout: TokenLayout) -> Packing:
    """A convolution merges groups; one more ends every row of these, and begins and ends every image."""
    merge = int(model.config.spatial_merge_size)
    rows, columns = (edge // merge for edge in layout.grid)
    whole = packing_of(model, layout, 1, merge, leading=True)
    return dataclasses.replace(whole, outputs=rows * (columns + 1) + 2)


def hunyuan_inputs(model: Any, x: Tensor) -> Inputs:
    """Flattened patches, row by row."""
    patches, grid = patches_of(x, edge_of(model), 1)
    return (patches.flatten(1), grid), {}


HUNYUAN = dataclasses.replace(
    PADDLE_OCR,
    name="transformers.hunyuan_vl",
    blocks=("layers",),
    out_projection="self_attn.o_proj",
    tokens=hunyuan_tokens,
    readout=lambda model: readout(
        model, "its last norm is called for every image alone; read the last resid_post", "pooler_output"
    ),
    inputs=hunyuan_inputs,
    packing=hunyuan_packing,
    refuses=lambda model: foreign_parts(model, HUNYUAN_PARTS),
)


def inkling_inputs(model: Any, x: Tensor) -> Inputs:
    """Cells of whole groups of patches, with channels last, and the grid of cells."""
    merge, patch = int(model.config.spatial_merge_size), edge_of(model)
    cells, grid = patches_of(x, (patch[0] * merge, patch[1] * merge), 1)
    return (cells.permute(0, 2, 3, 1), grid), {}


def inkling_tokens(model: Any) -> TokenLayout:
    """CLS, patches."""
    return tokens_of(model, int(model.config.spatial_merge_size), ("cls",))


def inkling_packing(model: Any, layout: TokenLayout) -> Packing:
    """CLS, then patches in groups."""
    merge = int(model.config.spatial_merge_size)
    return packing_of(model, layout, merge, merge)


INKLING2 = dataclasses.replace(
    INTERNVL,
    name="transformers.inkling2",
    blocks=("layers",),
    attention="self_attn",
    out_projection="self_attn.out_proj",
    parts={
        "": frozenset({"layernorm_before", "self_attn", "layernorm_after", "mlp", "lambda_1", "lambda_2"}),
        "self_attn": ATTENTION,
    },
    tokens=inkling_tokens,
    readout=lambda model: readout(model, "it has no last norm; read the last resid_post", "pooler_output"),
    inputs=inkling_inputs,
    packing=inkling_packing,
    counts_rows=True,
    refuses=lambda model: foreign_parts(model, INKLING_PARTS),
    any_size=lambda model: True,
)
