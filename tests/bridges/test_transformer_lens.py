"""TransformerLens's own tools on our models: names, shapes and meanings are theirs, the numbers the native model's."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor
from transformer_lens import ActivationCache, patching
from transformer_lens.tools.analysis import interchange

import vit_mechinterp as vmi
from tests.bridges.test_backends import state_of
from tests.engine.world import World, world_of
from tests.model import zoo
from tests.model.zoo import GatedAttention, Variant, plain
from tests.tiny_models import (
    HF_CLIP,
    HF_DINOV2,
    HF_VIT,
    MAIN,
    TIMM_PLAIN,
    TIMM_POOLED,
    TIMM_REGISTERS,
    Tiny,
    stirred,
)
from tests.zoo.transformers_models import build
from vit_mechinterp import InjectSubspace, Interchange, Run
from vit_mechinterp.bridges.transformer_lens import hooked
from vit_mechinterp.errors import ExecutionError, SpecError

VARIANTS = {variant.name: variant for variant in zoo.VARIANTS}
ALL = pytest.mark.parametrize("tiny", [*MAIN, TIMM_POOLED], ids=lambda tiny: tiny.name)


def close(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert float((one - other).detach().abs().max()) <= 1e-5 * max(1.0, float(other.detach().abs().max()))


@ALL
def test_the_cache_is_theirs_and_holds_what_the_oracle_says(tiny: Tiny) -> None:
    world = world_of(tiny)
    model = hooked(world.vit)
    before = state_of(world.module)
    with torch.no_grad():
        output, cache = model.run_with_cache(world.columns["base"])
    assert isinstance(cache, ActivationCache)
    expected, values = world.oracle.clean("base")
    close(output, expected)
    names = {hook: site for hook, site in model.site_of.items() if not hook.endswith("hook_result")}
    assert {"hook_embed", "blocks.0.attn.hook_rot_q", "blocks.2.hook_resid_mid"} <= set(names)
    assert set(names) | {name for name in cache if name.endswith("hook_scale")} == set(cache.keys())
    for hook, site in names.items():
        close(cache[hook], values[site])
    close(cache["pattern", 1].sum(-1), torch.ones_like(cache["pattern", 1][..., 0]))
    assert not torch.equal(cache["attn_scores", 1], cache["pattern", 1])
    assert state_of(world.module) == before


@ALL
def test_the_residual_stream_comes_apart_and_adds_up(tiny: Tiny) -> None:
    world = world_of(tiny)
    model, n_heads = hooked(world.vit), tiny.n_heads
    with torch.no_grad():
        _, cache = model.run_with_cache(world.columns["base"])
    values = world.oracle.clean("base")[1]
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels[:3] == ["embed", "0_attn_out", "0_mlp_out"]
    close(parts.sum(0), values["blocks.2.resid_post"])
    stages = cache.accumulated_resid(incl_mid=True)
    close(stages[1], values["blocks.0.resid_mid"])
    heads, labels = cache.stack_head_results(return_labels=True)
    assert labels[n_heads] == "L1H0"
    close(heads[n_heads + 1], values["blocks.1.attn.result"][:, :, 1])
    weights = (model.W_O, model.b_O, model.W_Q, model.W_K, model.W_V, model.b_V)
    shapes = [tuple(weight.shape[1:]) for weight in weights]
    d = world.module_width
    assert shapes == [(n_heads, tiny.d_head, d), (d,), *[(n_heads, d, tiny.d_head)] * 3, (n_heads, tiny.d_head)]
    found = torch.einsum("btm,hmd->bthd", values["blocks.1.ln1"], model.W_V[1]) + model.b_V[1]
    close(found, values["blocks.1.attn.v"])
    found = torch.einsum("bthd,hdm->btm", values["blocks.1.attn.z"], model.W_O[1]) + model.b_O[1]
    close(found, values["blocks.1.attn_out"])
    if tiny is TIMM_PLAIN:
        found = torch.einsum("btm,hmd->bthd", values["blocks.1.ln1"], model.W_Q[1]) + model.b_Q[1]
        close(found, values["blocks.1.attn.q"])


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, TIMM_REGISTERS, HF_VIT, HF_CLIP], ids=lambda tiny: tiny.name)
def test_logits_are_attributed_to_the_parts_of_the_token_that_the_head_reads(tiny: Tiny) -> None:
    world = world_of(tiny)
    model = hooked(world.vit)
    with torch.no_grad():
        logits, cache = model.run_with_cache(world.columns["base"])
        parts = cache.logit_attrs(cache.decompose_resid(), tokens=2, incorrect_tokens=0)[:, :, 0]
        readout = model.readout
        constant = (readout.head.weight[2] - readout.head.weight[0]) @ readout.norm.bias + model.b_U[2] - model.b_U[0]
        close(parts.sum(0) + constant, logits[:, 2] - logits[:, 0])
        assert model.W_U.shape == (world.module_width, logits.shape[1])
        each = cache.logit_attrs(cache.stack_head_results(pos_slice=0), tokens=torch.tensor([0, 1, 2]), pos_slice=0)
    assert each.shape[1] == 3
    assert float(parts.abs().max()) > 0.1


POOLED = VARIANTS["mae"], VARIANTS["aimv2"], VARIANTS["CLIPForImageClassification"]


@pytest.mark.parametrize("tiny", [HF_DINOV2, TIMM_POOLED, *POOLED], ids=lambda tiny: tiny.name)
def test_heads_that_read_several_tokens_have_directions_at_each(tiny: Tiny | Variant) -> None:
    vit = vmi.wrap(tiny.module())
    model, images = hooked(vit), torch.randn(2, *vit.layout.tokens.input_shape)
    with torch.no_grad():
        logits, cache = model.run_with_cache(images)
        parts = cache.decompose_resid()
        found = cache.logit_attrs(parts, tokens=2, incorrect_tokens=0)
        assert found.shape == parts.shape[:-1]
        # Without a stream, what is left are the constants: the head, on the norm's bias.
        silent = model.readout.head(getattr(model.readout.norm, "bias", torch.zeros(vit.layout.d_model)).repeat(len(model.readout.shares)))
        close(found.sum(0).sum(-1) + silent[2] - silent[0], logits[:, 2] - logits[:, 0])
        assert float(found.abs().max()) > 1e-2
        close(cache.logit_attrs(cache.decompose_resid(pos_slice=(1, 4)), 2, 0, pos_slice=(1, 4)), found[:, :, 1:4])
        each = cache.logit_attrs(parts, torch.tensor([2, 2]), torch.tensor([0, 0]))
        close(each, found)
        close(cache.logit_attrs(parts, 2, 0, batch_slice=1), found[:, 1])
    if len(model.readout.shares) == 2:
        with pytest.raises(SpecError, match="reads the first token and the patches' mean side by side"):
            model.tokens_to_residual_directions(0)
    else:
        assert model.tokens_to_residual_directions(0).shape == (vit.layout.d_model,)


def test_heads_without_directions_say_why() -> None:
    vit = vmi.wrap(VARIANTS["siglip"].module())
    model = hooked(vit)
    _, cache = model.run_with_cache(torch.randn(2, *vit.layout.tokens.input_shape))
    with pytest.raises(SpecError, match=r"Classes have no directions here: the head of .* does not read a token, or a mean"):
        cache.logit_attrs(cache.decompose_resid(), tokens=0)
    with pytest.raises(SpecError, match="Classes have no directions here"):
        _ = model.W_U
    close(cache.accumulated_resid(apply_ln=True)[-1], cache["ln_final.hook_normalized"])


def test_what_a_model_lacks_is_said_by_the_cache() -> None:
    torch.manual_seed(0)
    beside = plain(block_fn=ParallelThingsBlock)()
    model = hooked(vmi.wrap(stirred(beside).eval()))
    _, cache = model.run_with_cache(torch.randn(2, 3, 32, 32))
    with pytest.raises(SpecError, match=r"no hook point 'blocks\.0\.attn\.hook_z': the block runs several attention modules"):
        cache.stack_head_results()
    with pytest.raises(KeyError, match=r"blocks\.1\.hook_mlp_out is not in this cache: run_with_cache was told to leave it out"):
        model.run_with_cache(torch.randn(2, 3, 32, 32), names_filter="hook_embed")[1]["mlp_out", -1]

    cait = timm.create_model("cait_xxs24_224", img_size=64, embed_dim=24, depth=1, num_heads=3, num_classes=5)
    model = hooked(vmi.wrap(cait.eval()))
    _, cache = model.run_with_cache(torch.randn(1, 3, 64, 64))
    with pytest.raises(SpecError, match=r"No norm behind the blocks of Cait is known.*apply_ln=False"):
        cache.accumulated_resid(apply_ln=True)


def test_a_stream_that_changes_between_blocks_is_not_taken_apart() -> None:
    vit = vmi.wrap(build("YolosForObjectDetection"))
    _, cache = hooked(vit).run_with_cache(torch.randn(1, *vit.layout.tokens.input_shape))
    with pytest.raises(SpecError, match="YolosForObjectDetection adds to the residual stream in front of block 1"):
        cache.decompose_resid()
    assert len(cache.decompose_resid(layer=0)) == 1


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_VIT], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("hook", ["blocks.0.attn.hook_pattern", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_result"])
def test_an_edit_at_a_hook_means_what_its_name_says(tiny: Tiny, hook: str) -> None:
    world = world_of(tiny)
    model = hooked(world.vit)
    site = model.site_of[hook]
    run: dict[str, Any] = {"name": "r", "interventions": [{"op": "interchange", "site": site, "source": "source"}]}
    expected, _ = world.oracle.run(run)
    assert float((expected - world.oracle.clean("base")[0]).abs().amax(1).min()) > 1e-3 * world.scale
    with torch.no_grad():
        _, source = model.run_with_cache(world.columns["source"], names_filter=[hook])
        found = model.run_with_hooks(world.columns["base"], fwd_hooks=[(hook, lambda activation, hook: source[hook.name])])
        close(found, expected)
        with model.hooks(fwd_hooks=[(hook, lambda activation, hook: source[hook.name])]):
            close(model(world.columns["base"]), expected)
        close(model(world.columns["base"]), world.oracle.clean("base")[0])


def test_results_are_cached_where_they_do_not_follow_from_z() -> None:
    torch.manual_seed(0)
    module = stirred(plain(attn_layer=GatedAttention)()).eval()
    vit = vmi.wrap(module)
    model, images = hooked(vit), torch.randn(2, 3, 32, 32)
    _, cache = model.run_with_cache(images)
    expected = vit.run(images, capture=["blocks.1.attn.result"])[1]["blocks.1.attn.result"]
    close(cache.stack_head_results()[4], expected[:, :, 1])
    _, cache = model.run_with_cache(images, names_filter=lambda name: name.endswith("hook_z"))
    with pytest.raises(SpecError, match=r"a gate or a norm lies between\), so attn\.z times W_O is no head's result"):
        cache.stack_head_results()


def test_gradients_pass_the_hook_points() -> None:
    world = World(TIMM_PLAIN)
    model = hooked(world.vit)
    gradients: list[Tensor] = []
    with model.hooks(bwd_hooks=[("blocks.1.hook_resid_post", lambda gradient, hook: gradients.append(gradient))]):
        model(world.columns["base"])[:, 0].sum().backward()
    stream = world.oracle.clean("base")[1]["blocks.1.resid_post"]
    assert gradients[0].shape == stream.shape
    assert float(gradients[0].abs().max()) > 0


def test_a_model_that_drops_at_random_is_refused() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module().train())
    hooked(vit)
    vit.module.head_drop.p = 0.5
    with pytest.raises(ExecutionError, match="drop"):
        hooked(vit)


def test_what_cannot_be_edited_or_does_not_exist_says_so() -> None:
    world = world_of(TIMM_PLAIN)
    model = hooked(world.vit)
    with pytest.raises(SpecError, match=r"blocks\.0\.ln1\.hook_scale was edited, and it can be read only"):
        model.run_with_hooks(world.columns["base"], fwd_hooks=[("blocks.0.ln1.hook_scale", lambda scale, hook: scale * 2)])
    with pytest.raises(SpecError, match=r"no hook point 'blocks\.0\.hook_resid_pst'\. Close matches: blocks\.0\.hook_resid_post"):
        model.run_with_hooks(world.columns["base"], fwd_hooks=[("blocks.0.hook_resid_pst", lambda q, hook: q)])
    with pytest.raises(SpecError, match="A ViT takes images, not text"):
        model.to_tokens("a cat")
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model, model.cfg.d_head) == (3, 3, 24, 8)
    assert (model.cfg.n_ctx, model.cfg.d_vocab, model.cfg.d_mlp, model.cfg.normalization_type) == (17, 5, 96, "LN")
    assert model.original_model is world.module
    assert not any(hasattr(module, "name") for module in world.module.modules())


def test_their_activation_patching_runs_on_images() -> None:
    world = world_of(HF_VIT)
    model = hooked(world.vit)
    base, source = world.columns["base"], world.columns["source"]
    with torch.no_grad():
        _, cache = model.run_with_cache(source)
        index = pd.DataFrame({"layer": [0, 1, 1], "pos": [3, 3, 0]})
        found = patching.generic_activation_patch(
            model, base, cache, lambda logits: logits[:, 0].mean(), patching.layer_pos_patch_setter, "resid_post", index_df=index
        )
    swap = Interchange(site="blocks.0.resid_post", tokens=[2], source="source")
    runs = [Run(name="a", interventions=[swap]), Run(name="b", interventions=[swap.at(layer=1)])]
    runs.append(Run(name="c", interventions=[swap.at(layer=1, tokens="cls")]))
    ours = vmi.execute(world.vit, runs, world.columns).logits[:, :, 0].mean(1)
    close(found, ours)
    assert len(set(ours.tolist())) == 3


def test_their_subspaces_are_ours_and_das_trains() -> None:
    world = World(TIMM_PLAIN)
    model, hook = hooked(world.vit), "blocks.1.hook_resid_post"
    base, source = world.columns["base"], world.columns["source"]
    basis = interchange.random_basis(24, 4, seed=0)
    positions = torch.tensor([1, 5, 9])
    activations = interchange.collect_activations(model, hook, source, model, positions=positions)
    found = interchange.intervened_logits(
        model, hook, interchange.SubspaceInterchange(basis), base, activations, model, positions=positions
    )
    patches = {"at": (positions - 1)[:, None], **world.columns}
    inject = InjectSubspace(site="blocks.1.resid_post", tokens={"column": "at"}, source="source", basis="basis")
    ours = vmi.execute(world.vit, Run(name="r", interventions=[inject]), patches, {"basis": basis}).logits[0]
    close(found, ours)
    assert float((ours - world.oracle.clean("base")[0]).abs().max()) > 1e-2

    targets = torch.tensor([0, 1, 0])
    fitted = interchange.fit_das(
        model, hook, base, source, targets, model, rank=2, seed=0, base_positions=torch.zeros(3, dtype=torch.long),
        source_positions=torch.zeros(3, dtype=torch.long), epochs=2,
    )  # fmt: skip
    learned = getattr(fitted, "subspace", fitted).basis.detach()
    close(learned.T @ learned, torch.eye(2))
    assert all(parameter.requires_grad for parameter in world.module.parameters())
