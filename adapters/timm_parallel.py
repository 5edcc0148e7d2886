"""timm's ViTs whose blocks run attention and MLP side by side, on one input and into one sum.

Such a block has no stream between attention and MLP. Where both leave through one sum, each increment is its
share.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vit_mechinterp.adapters.timm_differential import LAMBDAS, TWO_PATTERNS
from vit_mechinterp.adapters.timm_differential import heads as differential_heads
from vit_mechinterp.adapters.timm_vit import VIT, unfit
from vit_mechinterp.model.layout import Difference, Port, Share

PARTS = frozenset(
    {
        "in_norm",
        "in_proj",
        "mlp_bias",
        "q_norm",
        "k_norm",
        "attn_drop",
        "mlp_drop",
        "mlp_act",
        "attn_out_proj",
        "mlp_out_proj",
        "ls",
        "drop_path",
    }
)
ONE_SUM = "attention and MLP run side by side and are added at once; edit resid_pre, attn_out or mlp_out"
ONE_NORM = "attention and MLP read one norm; read ln1"
SEVERAL = "the block runs several attention modules side by side, so there is no single one"
SEVERAL_MLPS = "the block runs several MLPs side by side, so there is no single one"


def heads(block: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    return int(block.num_heads), int(block.head_dim)


PARALLEL = replace(
    VIT,
    name="timm.parallel",
    attention="",
    out_projection="attn_out_proj",
    attention_scale=("ls.gamma",),
    parts={"": PARTS},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("in_norm"),),
        "attn_out": (Share("attn_out_proj", "drop_path", "ls.gamma"),),
        "mlp.pre": (Port("mlp_act", "input"),),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp_drop"),),
        "mlp_out": (Share("mlp_out_proj", "drop_path", "ls.gamma"),),
        "resid_post": (Port(""),),
    },
    absent={"resid_mid": ONE_SUM, "ln2": ONE_NORM},
    parallel=True,
    heads=heads,
    refuses=unfit,
)

PARALLEL_DIFFERENTIAL = replace(
    PARALLEL,
    name="timm.parallel_differential",
    out_projection="out_proj",
    parts={"": (PARTS - {"attn_out_proj", "mlp_out_proj"}) | {"out_proj"} | LAMBDAS},
    ports={
        **PARALLEL.ports,
        "attn.q": (Port("q_norm", head_first=True, requires=(Port.has("sub_norm"),)),),
        "attn.k": (Port("k_norm", head_first=True),),
        "attn.v": (Port("in_proj", heads="last"),),
        "attn.z": (Port("out_proj", "input", heads="first"),),
        "attn_out": (Share("out_proj", "drop_path", "ls.gamma", inputs="first"),),
        "mlp_out": (Share("out_proj", "drop_path", "ls.gamma", inputs="last"),),
    },
    absent={**PARALLEL.absent, "attn.scores": TWO_PATTERNS, "attn.pattern": TWO_PATTERNS},
    heads=differential_heads,
)

PARALLEL_THINGS = replace(
    VIT,
    name="timm.parallel_things",
    attention="attns.0.attn",
    out_projection="attns.0.attn.proj",
    attention_scale=(),
    parts={"": frozenset({"attns", "ffns"})},
    ports={
        "resid_pre": (Port("", "input"),),
        "attn_out": (Difference("resid_mid", "resid_pre"),),
        "resid_mid": (Port("ffns.0", "input", in_place=True),),
        "mlp_out": (Difference("resid_post", "resid_mid"),),
        "resid_post": (Port(""),),
    },
    absent={
        "ln1": SEVERAL,
        **{f"attn.{site}": SEVERAL for site in ("q", "k", "v", "scores", "pattern", "z", "result")},
        "ln2": SEVERAL_MLPS,
        **{f"mlp.{site}": SEVERAL_MLPS for site in ("pre", "pre_linear", "post")},
    },
    refuses=unfit,
)
