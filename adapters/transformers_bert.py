"""transformers' ViTs in the style of BERT: YOLOS, DPT, VideoMAE, ViTPose, and FLAVA's image tower.

In transformers 4 this is also the layout of ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA and ViViT. Attention is
``attention.attention`` (query, key, value) and ``attention.output``. Except in ViTPose the residual
connection around the MLP is made inside ``output``, behind its dropout.
"""

from __future__ import annotations

from typing import Any

from vit_mechinterp.adapters.transformers_readout import (
    base,
    d_model,
    grid_of,
    heads,
    prefix_of,
    readout,
    refusal,
    returns_tuple,
    tubelets_of,
)
from vit_mechinterp.adapters.transformers_vit import in_order, masks
from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

NAMES = ("vit", "deit", "ijepa", "vivit", "dpt", "videomae", "backbone")
PARTS = frozenset({"embeddings", "encoder", "layernorm", "pooler"})
HEADS = ("fc_norm", "class_labels_classifier", "bbox_predictor", "head")
BLOCK = frozenset({"layernorm_before", "attention", "layernorm_after", "intermediate", "output", "mlp"})
ATTENTION = frozenset({"query", "key", "value", "q_bias", "v_bias", "dropout"})


def tokens(model: Any) -> TokenLayout:
    """CLS (not in VideoMAE, ViTPose and I-JEPA), DeiT's distillation token, patches or tubelets, and in YOLOS
    detection tokens behind them."""
    embeddings = base(model, *NAMES)[1].embeddings
    detection = getattr(embeddings, "detection_tokens", None)
    suffix = ("detection",) * (0 if detection is None else int(detection.shape[1]))
    config = base(model, *NAMES)[1].config
    if not isinstance(getattr(config, "tubelet_size", 1), int):
        return tubelets_of(config, prefix_of(embeddings))
    frames = (int(config.num_frames), int(config.tubelet_size)) if hasattr(config, "tubelet_size") else None
    return grid_of(base(model, *NAMES)[1], prefix_of(embeddings), suffix, frames=frames)


def bert_readout(model: Any) -> Readout:
    """YOLOS reads its detection tokens, VideoMAE the normed mean, ViTPose a map of all patches."""
    prefix, inner = base(model, *NAMES)
    ln_final: Port | str = Port(prefix + "layernorm")
    if getattr(inner, "layernorm", None) is None:
        ln_final = "its last norm acts on the mean of the tokens; read pooled, or the last resid_post"
    if hasattr(model, "bbox_predictor"):
        unpooled = "the detection tokens are read out one by one; read ln_final"
        return Readout(
            "logits", {"ln_final": ln_final, "pooled": unpooled, "logits": Port("", field="logits")}
        )
    if prefix == "backbone.":
        unpooled = "keypoints are read from a map of all patches; read ln_final"
        heatmaps = Port("", field="heatmaps")
        return Readout("heatmaps", {"ln_final": ln_final, "pooled": unpooled, "logits": heatmaps})
    return readout(model, ln_final, pools=getattr(inner, "pooler", None) is not None)


def refuses(model: Any) -> str | None:
    """Detection, pose and other heads that are not known."""
    inner = base(model, *NAMES)[1]
    if getattr(inner.config, "is_hybrid", False):
        return "its patches come from a convolutional network whose grid the configuration does not tell"
    if getattr(inner.config, "num_experts", 1) > 1:
        return "its MLPs are mixtures of experts chosen by a dataset index that images do not carry"
    return masks(model, inner.embeddings) or refusal(model, (*NAMES, *HEADS), PARTS, tokens(model))


BERT = Family(
    name="transformers.bert_style",
    library="transformers",
    blocks=(*tuple(f"{name}.encoder.layer" for name in NAMES), "encoder.layer"),
    attention="attention.attention",
    out_projection="attention.output.dense",
    parts={"": BLOCK, "attention.attention": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("layernorm_before"),),
        "attn_out": (Port("attention.output"),),
        "resid_mid": (Port("layernorm_after", "input", in_place=True),),
        "ln2": (Port("layernorm_after"),),
        "mlp.pre": (Port("mlp.fc1"), Port("intermediate.dense")),
        "mlp.pre_linear": (),
        "mlp.post": (Port("mlp.fc2", "input"), Port("output.dense", "input")),
        "mlp_out": (Port("mlp"), Port("output.dropout")),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=lambda model: d_model(base(model, *NAMES)[1]),
    heads=heads,
    readout=bert_readout,
    inputs=lambda model, x: in_order(base(model, *NAMES)[1].embeddings, x),
    returns_tuple=returns_tuple,
    recorded=True,  # ViTPose's backbone hands on what transformers' recording hooks have seen
    refuses=refuses,
)
