"""timm's ViTs with norms behind both: `ResPostBlock`, `ResPostRelPosBlock`, `EvaBlockPostNorm`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vit_mechinterp.adapters.timm_vit import VIT, norms_follow, unfit
from vit_mechinterp.model.layout import Port


def refuses(model: Any) -> str | None:
    """Whether norms come before the branches, or images are not what is expected."""
    return unfit(model) if norms_follow(model) else "its norms come before attention and MLP, not after"


POST_NORM = replace(
    VIT,
    name="timm.post_norm",
    parts={**VIT.parts, "": frozenset({"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"})},
    ports={**VIT.ports, "resid_mid": (Port("mlp", "input", in_place=True),)},
    absent={
        "ln1": "its norm acts on what attention puts out; read resid_pre before it, attn_out behind the norm",
        "ln2": "its norm acts on what the MLP puts out; read resid_mid before it, mlp_out behind the norm",
        "attn.result": "a norm acts on the sum of the heads, so no head has an increment of its own",
    },
    refuses=refuses,
)
