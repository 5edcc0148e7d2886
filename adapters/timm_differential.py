"""timm's ViTs with differential attention: every head subtracts a second attention pattern from its first.

Queries and keys therefore come in pairs: the first half of a head's ``attn.q`` and ``attn.k`` makes its first
pattern, the second half the one that is subtracted. A head's output is normalised by itself before the output
projection; ``attn.z`` is what enters that projection.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vit_mechinterp.adapters.timm_vit import ATTENTION, VIT
from vit_mechinterp.model.layout import Port

TWO_PATTERNS = "differential attention computes two per head and subtracts them, so there is no single one"
LAMBDAS = frozenset({"lambda_a", "lambda_b", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "sub_norm"})


def heads(attention: Any) -> tuple[int, int]:
    """Number of heads and the width of what one puts out: twice that of its queries."""
    return int(attention.num_heads), 2 * int(attention.head_dim)


DIFFERENTIAL = replace(
    VIT,
    name="timm.differential",
    parts={**VIT.parts, "attn": ATTENTION | LAMBDAS},
    ports={
        **VIT.ports,
        "attn.q": (Port("attn.q_norm", head_first=True, requires=(Port.has("attn.sub_norm"),)),),
        "attn.k": (Port("attn.k_norm", head_first=True),),
        "attn.v": (Port("attn.qkv", heads="last"),),
        "attn.z": (Port("attn.norm", "input", heads="first"),),
    },
    absent={"attn.scores": TWO_PATTERNS, "attn.pattern": TWO_PATTERNS},
    heads=heads,
)
