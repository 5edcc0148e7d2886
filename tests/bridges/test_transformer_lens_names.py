"""Queries and keys under TransformerLens's two names: as projected, and as they enter the dot product."""

from __future__ import annotations

import pytest
import torch

from tests.bridges.test_transformer_lens import close
from tests.engine.world import world_of
from tests.tiny_models import TIMM_PLAIN
from tests.zoo.test_timm import tiny as tiny_timm
from vit_mechinterp.bridges.transformer_lens import hooked
from vit_mechinterp.errors import SpecError


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_rotated_queries_have_their_name_alone(name: str) -> None:
    vit = tiny_timm(name)
    model, images = hooked(vit), torch.randn(2, *vit.layout.tokens.input_shape)
    _, cache = model.run_with_cache(images)
    assert "blocks.0.attn.hook_q" not in model.hook_dict
    scores = torch.einsum("bqhd,bkhd->bhqk", cache["rot_q", 1], cache["rot_k", 1]) / vit.layout.d_head**0.5
    close(scores, cache["attn_scores", 1])
    _, cut = model.run_with_cache(images, pos_slice=(1, 3))
    close(cut["rot_q", 0], cache["rot_q", 0][:, 1:3])
    close(cut["attn_scores", 0], cache["attn_scores", 0][:, :, 1:3])
    with pytest.raises(SpecError, match=r"no hook point 'blocks\.0\.attn\.hook_q': write blocks\.0\.attn\.hook_rot_q"):
        model.run_with_hooks(images, fwd_hooks=[("blocks.0.attn.hook_q", lambda q, hook: q)])


def test_queries_that_are_projected_alone_have_both_names() -> None:
    world = world_of(TIMM_PLAIN)
    model = hooked(world.vit)
    with torch.no_grad():
        _, cache = model.run_with_cache(world.columns["base"])
        assert torch.equal(cache["q", 1], cache["rot_q", 1])
        one, other = (
            model.run_with_hooks(world.columns["base"], fwd_hooks=[(f"blocks.0.attn.{hook}", lambda q, hook: q * 2)])
            for hook in ("hook_q", "hook_rot_q")
        )
    close(one, other)
    assert float((one - world.oracle.clean("base")[0]).abs().max()) > 1e-3
