"""What a call of attention gives step by step is what torch makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vit_mechinterp.model.attention_call import AttentionCall, softmax_over_keys

HEADS, TOKENS = 4, 7
DRAW = torch.Generator().manual_seed(0)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "causal": {"is_causal": True},
    "masked": {"attn_mask": torch.rand(2, HEADS, TOKENS, TOKENS, generator=DRAW) > 0.4},
    "biased": {"attn_mask": torch.randn(HEADS, TOKENS, TOKENS, generator=DRAW), "scale": 0.3},
    "grouped": {"enable_gqa": True},
    "dropped": {"dropout_p": 1.0},
}


def call_of(options: dict[str, Any]) -> AttentionCall:
    draw = torch.Generator().manual_seed(1)
    few = 2 if options.get("enable_gqa") else HEADS
    query, key, value = (torch.randn(2, heads, TOKENS, 5, generator=draw) for heads in (HEADS, few, few))
    return AttentionCall(query, key, value, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_and_the_fused_kernel_agree(name: str) -> None:
    call = call_of(OPTIONS[name])
    native = F.scaled_dot_product_attention(call.query, call.key, call.value, **OPTIONS[name])
    explicit = call.mixed(softmax_over_keys(call.scores(), own=False))
    torch.testing.assert_close(call.fused(), native)
    torch.testing.assert_close(explicit, native)
    plain = F.scaled_dot_product_attention(call.query, call.key, call.value, enable_gqa=name == "grouped")
    assert torch.equal(native, plain) == (name in ("plain", "grouped"))


def test_heads_that_are_folded_into_the_batch_get_an_axis_and_their_masks() -> None:
    masked = OPTIONS["masked"]["attn_mask"]
    folded = AttentionCall(*(x.flatten(0, 1) for x in call_of({}).parts), attn_mask=masked.flatten(0, 1))
    unfolded = folded.unfolded(lambda x: x.reshape(-1, HEADS, *x.shape[1:]))
    torch.testing.assert_close(unfolded.fused(), call_of(OPTIONS["masked"]).fused())
    assert unfolded.scores().shape == (2, HEADS, TOKENS, TOKENS)
