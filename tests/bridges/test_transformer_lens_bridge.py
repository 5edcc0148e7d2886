"""TransformerLens's own bridge of a ViT, as an independent implementation of what hook points mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

import vit_mechinterp as vmi
from tests.bridges.test_transformer_lens import close
from tests.engine.world import world_of
from tests.tiny_models import HF_VIT
from vit_mechinterp.bridges.transformer_lens import hooked

# Their scores come after the softmax, and their normalized streams before the norm's weight and bias.
OTHERWISE = ("hook_attn_scores", "hook_normalized")
OURS_ALONE = ("hook_rot_q", "hook_rot_k", "hook_result")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    HF_VIT.module().save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


@torch.no_grad()
def test_their_cache_and_weights_are_ours(theirs: Any) -> None:
    world = world_of(HF_VIT)
    ours = hooked(world.vit)
    (output, cache), (expected, reference) = (model.run_with_cache(world.columns["base"]) for model in (ours, theirs))
    close(output, expected)
    names = [name for name in cache if not name.endswith((*OTHERWISE, *OURS_ALONE))]
    assert len(names) == 3 * 14 + 2
    for name in names:
        close(cache[name], reference[name])
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        close(getattr(ours, name), getattr(theirs, name))


@torch.no_grad()
@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("hook_resid_pre", "resid_pre"), ("attn.hook_q", "attn.q"), ("attn.hook_v", "attn.v"), ("attn.hook_z", "attn.z"),
        ("hook_attn_out", "attn_out"), ("mlp.hook_post", "mlp.post"), ("hook_mlp_out", "mlp_out"), ("hook_resid_post", "resid_post"),
    ],
)  # fmt: skip
def test_their_interchanges_are_the_engines(theirs: Any, hook: str, site: str) -> None:
    world = world_of(HF_VIT)
    name, place = f"blocks.1.{hook}", f"blocks.1.{site}"
    _, source = theirs.run_with_cache(world.columns["source"])
    given = [(name, lambda value, hook: torch.cat([value[:, :3], source[name][:, 3:]], dim=1))]
    expected = theirs.run_with_hooks(world.columns["base"], fwd_hooks=given)
    swap = vmi.Interchange(site=place, source="source", tokens=list(range(2, 16)))
    close(vmi.execute(world.vit, vmi.Run(name="r", interventions=[swap]), world.columns).logits[0], expected)
    close(hooked(world.vit).run_with_hooks(world.columns["base"], fwd_hooks=given), expected)
    assert float((expected - world.oracle.clean("base")[0]).abs().amax(dim=1).min()) > 1e-3
