"""timm's XCiT: attention between channels, and a convolution over the patches as a third branch."""

from __future__ import annotations

from dataclasses import replace

from vit_mechinterp.adapters.timm_cait import CAIT
from vit_mechinterp.model.layout import Port

BLOCK = frozenset(
    {
        "norm1",
        "attn",
        "drop_path1",
        "norm3",
        "local_mp",
        "drop_path3",
        "norm2",
        "mlp",
        "drop_path2",
        "gamma1",
        "gamma2",
        "gamma3",
    }
)
ATTENTION = frozenset({"qkv", "attn_drop", "proj", "proj_drop", "temperature"})
CHANNELS = "attention runs between the channels of a head, not between tokens"

XCIT = replace(
    CAIT,
    name="timm.xcit",
    attention_scale=("gamma1",),
    parts={"": BLOCK, "attn": ATTENTION},
    ports={
        **{site: CAIT.ports[site] for site in CAIT.ports if site != "resid_mid"},
        "ln1": (Port("norm1", requires=(Port.has("local_mp"),)),),
        "attn.v": (Port("attn.qkv", heads="last"),),
        "attn.z": (Port("attn.proj", "input", heads="first"),),
        "attn_out": (Port("drop_path1"),),
        "mlp_out": (Port("drop_path2"),),
    },
    mixing=None,
    absent={
        **{f"attn.{site}": CHANNELS for site in ("q", "k", "scores", "pattern")},
        "resid_mid": "a convolution adds to the stream between attention and MLP, so it has two middles",
    },
)
