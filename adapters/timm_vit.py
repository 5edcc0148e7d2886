"""timm's ViTs with norms before attention and MLP: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, EVA, BEiT.

Convolutional stems and relative position biases change nothing here.

``drop_path1`` and ``drop_path2`` are always modules and sit after LayerScale, so their outputs are the exact
increments of the residual stream. Packed, separate and bypassed projections, rotary positions, relative
position bias, query and key norms and grouped queries all end in one attention call and need nothing of their
own. (timm repeats the keys and values of grouped queries before that call, so ``attn.k`` and ``attn.v`` show
one head for every query head, equal within a group; an edit of one reaches its own query head alone.)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vit_mechinterp.model.layout import Family, Port, Readout, TokenLayout

SCALES = {"ls1", "ls2", "gamma_1", "gamma_2"}
BLOCK = frozenset({"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"} | SCALES)
PROJECTIONS = {"qkv", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias", "proj"}
BIASES = {"rel_pos", "relative_position_bias_table"}
ATTENTION = frozenset({"q_norm", "k_norm", "attn_drop", "norm", "gate", "proj_drop"} | PROJECTIONS | BIASES)


def tokens(model: Any) -> TokenLayout:
    """Prefix tokens in the order in which `VisionTransformer._pos_embed` concatenates them."""
    prefix: tuple[str, ...] = ("cls",) if model.cls_token is not None else ()
    if getattr(model, "dist_token", None) is not None:
        prefix += ("distillation",)
    prefix += ("registers",) * (model.num_prefix_tokens - len(prefix))
    patches = model.patch_embed
    # A convolutional stem makes a patch larger than its own stride.
    height, width = patches.feat_ratio(as_scalar=False)
    return TokenLayout(
        prefix=prefix,
        grid=tuple(patches.grid_size),
        patch_size=(int(height), int(width)),
        image_size=tuple(patches.img_size),
        padded=bool(getattr(patches, "dynamic_img_pad", False)),
    )


def readout(model: Any) -> Readout:
    """``norm``, pooling, ``fc_norm``, ``head``; ``norm`` is an identity where ``fc_norm`` follows pooling."""
    normed = not isinstance(model.norm, nn.Identity)
    ln_final: Port | str = Port("norm") if normed else "its last norm acts on the pooled vector; read pooled"
    if hasattr(model, "head_dist"):
        pooled = "two heads read two tokens; read ln_final"
        return Readout(None, {"ln_final": ln_final, "pooled": pooled, "logits": Port("")})
    headless = isinstance(model.head, nn.Identity)
    if not model.global_pool and getattr(model, "attn_pool", None) is None:
        unpooled = "the model is made without pooling; read ln_final"
        name = "last_hidden_state" if headless else "logits of every token"
        return Readout(None, {"ln_final": ln_final, "pooled": unpooled, "logits": unpooled}, name)
    if headless:
        ports = {"ln_final": ln_final, "pooled": Port(""), "logits": "the model has no head"}
        return Readout(None, ports, "pooled")
    return Readout(None, {"ln_final": ln_final, "pooled": Port("head", "input"), "logits": Port("")})


def norms_follow(model: Any) -> bool:
    """Whether the blocks' norms come after attention and MLP; their parts are the same, in another order."""
    order = [name for name, _ in model.blocks[0].named_children()]
    return order.index("norm1") > order.index("attn")


def wrong_channels(model: Any) -> str | None:
    """Whether images have other than three channels; the first convolution of a model is its stem's."""
    of_stems = (part.in_channels for part in model.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d)))
    channels = getattr(model, "in_chans", None) or next(of_stems, 3)
    return None if channels == 3 else f"it takes images of {channels} channels, and images have 3"


def unfit(model: Any) -> str | None:
    """Whether the patch grid is unknown until an image comes, or images have other than three channels."""
    if getattr(model.patch_embed, "grid_size", None) is None:
        return "its patch grid is not fixed; create it with img_size"
    return wrong_channels(model)


def refuses(model: Any) -> str | None:
    """Whether norms follow the branches, or images are not what is expected."""
    return "its norms come after attention and MLP, not before" if norms_follow(model) else unfit(model)


def d_model(model: Any) -> int:
    """Width of the residual stream."""
    return int(model.embed_dim)


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads, and the width of one."""
    n_heads = int(attention.num_heads)
    return n_heads, int(attention.proj.in_features) // n_heads


VIT = Family(
    name="timm.vit",
    library="timm",
    blocks=("blocks",),
    attention="attn",
    out_projection="attn.proj",
    attention_scale=("ls1.gamma", "gamma_1"),
    parts={"": BLOCK, "attn": ATTENTION},
    ports={
        "resid_pre": (Port("", "input"),),
        "ln1": (Port("norm1"),),
        "attn_out": (Port("drop_path1"),),
        "resid_mid": (Port("norm2", "input", in_place=True),),
        "ln2": (Port("norm2"),),
        "mlp.pre": (
            Port("mlp.fc1_g"),
            Port("mlp.fc1", part=(1, 2), requires=(Port.has("mlp.gate_last", True),)),
            Port("mlp.fc1", part=(0, 2), requires=(Port.has("mlp.gate_last", False),)),
            Port("mlp.fc1"),
            Port("mlp.w0"),
        ),
        "mlp.pre_linear": (
            Port("mlp.fc1_x"),
            Port("mlp.fc1", part=(0, 2), requires=(Port.has("mlp.gate_last", True),)),
            Port("mlp.fc1", part=(1, 2), requires=(Port.has("mlp.gate_last", False),)),
            Port("mlp.w1"),
        ),
        "mlp.post": (Port("mlp.fc2", "input"), Port("mlp.w2", "input")),
        "mlp_out": (Port("drop_path2"),),
        "resid_post": (Port(""),),
    },
    tokens=tokens,
    d_model=d_model,
    heads=heads,
    readout=readout,
    refuses=refuses,
    any_size=lambda model: bool(getattr(model, "dynamic_img_size", False)),
)
