"""The vision towers of transformers' BLIP, BLIP-2 and InstructBLIP: CLIP's layout with packed q, k and v.

BLIP writes its attention out; the others call the fused kernel. The last norm acts twice: on all tokens, and
once more on CLS.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vit_mechinterp.adapters.transformers_clip import BLOCK, CLIP, NAMES, clip_tokens
from vit_mechinterp.adapters.transformers_readout import base, readout, refusal
from vit_mechinterp.model.layout import Port, Readout

PARTS = frozenset({"embeddings", "encoder", "post_layernorm"})


def blip_readout(model: Any) -> Readout:
    """The first of the last norm's two calls acts on all tokens."""
    return readout(model, Port(base(model, *NAMES)[0] + "post_layernorm", call=0))


def refuses(model: Any) -> str | None:
    """Models that hold more than the tower."""
    return refusal(model, NAMES, PARTS, clip_tokens(model))


BLIP = dataclasses.replace(
    CLIP,
    name="transformers.blip",
    out_projection="self_attn.projection",
    parts={"": BLOCK, "self_attn": frozenset({"qkv", "projection", "dropout"})},
    readout=blip_readout,
    refuses=refuses,
)
