"""Every name that timm lists for the covered modules, tiny: it conforms, and what it lacks it gives a reason for."""

from __future__ import annotations

import copy

import pytest
import torch

import vit_mechinterp as vmi
from tests.tiny_models import stirred
from tests.zoo.shrink import MODULES, module_of, names, shrunk
from vit_mechinterp import HookedViT, Run
from vit_mechinterp.errors import UnsupportedSiteError
from vit_mechinterp.model.conformance import check
from vit_mechinterp.spec import BLOCK_SITES

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z", "attn.result")

# One name per row, and the sites that the first block of it has not. Rows with a gated MLP have all others.
ROWS = {
    "vit_tiny_patch16_224": ("timm.vit", ("mlp.pre_linear",)),
    "eva02_base_patch14_224": ("timm.vit", ()),
    "vitamin_small_224": ("timm.vit", ()),
    "eva02_enormous_patch14_clip_224": ("timm.post_norm", ("ln1", "attn.result", "ln2", "mlp.pre_linear")),
    "naflexvit_base_patch16_siglip": ("timm.naflex", ("mlp.pre_linear",)),
    "vit_dwee_patch16_reg1_gap_256": ("timm.differential", ("attn.scores", "attn.pattern", "mlp.pre_linear")),
    "vit_base_patch16_xp_224": ("timm.parallel", ("resid_mid", "ln2", "mlp.pre_linear")),
    "vit_dpwee_patch16_reg1_gap_256": (
        "timm.parallel_differential", ("attn.scores", "attn.pattern", "resid_mid", "ln2", "mlp.pre_linear"),
    ),
    "vit_small_patch16_18x2_224": (
        "timm.parallel_things", ("ln1", *ATTENTION, "ln2", "mlp.pre", "mlp.pre_linear", "mlp.post"),
    ),
    "samvit_base_patch16": ("timm.sam", (*ATTENTION, "mlp.pre_linear")),
    "qwen3_vit_88m": ("timm.encoder", ("mlp.pre_linear",)),
    "deepseek_vit_412m_enc": ("timm.encoder", ()),
    "gemma4_vit_167m": ("timm.gemma4", ("attn.result",)),
    "cait_xxs24_224": ("timm.cait", ("mlp.pre_linear",)),
    "xcit_nano_12_p16_224": (
        "timm.xcit", ("attn.q", "attn.k", "attn.scores", "attn.pattern", "resid_mid", "mlp.pre_linear"),
    ),
}  # fmt: skip


def tiny(name: str) -> HookedViT:
    """The wrapped tiny architecture; every parameter matters to its output."""
    torch.manual_seed(0)
    module = shrunk(name)
    # A convolutional stem keeps its own initialisation, under which a token sees its own patch best.
    stem = (
        copy.deepcopy(module.patch_embed)
        if hasattr(getattr(module, "patch_embed", None), "backbone")
        else None
    )
    stirred(module)
    if stem is not None:
        module.patch_embed = stem
    return vmi.wrap(module.eval())


def images(vit: HookedViT, seed: int) -> torch.Tensor:
    """Two random images."""
    return torch.randn(2, *vit.layout.tokens.input_shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.zoo
@pytest.mark.parametrize("name", names())
def test_every_name_conforms(name: str) -> None:
    report = check(tiny(name))
    assert report.passed, str(report)


def test_covers_the_modules_whole() -> None:
    assert len(names()) >= 340
    assert {module_of(name) for name in names()} == set(MODULES)


@pytest.mark.parametrize("name", ROWS)
def test_says_what_it_lacks_and_why(name: str) -> None:
    vit = tiny(name)
    family, missing = ROWS[name]
    assert vit.layout.family.name == family
    assert [site for site in BLOCK_SITES if f"blocks.0.{site}" in vit.layout.absent] == sorted(
        missing, key=BLOCK_SITES.index
    )
    for site in missing:
        reason = vit.layout.absent[f"blocks.0.{site}"]
        with pytest.raises(UnsupportedSiteError, match="does not exist"):
            vit.run(images(vit, 0), capture=[f"blocks.0.{site}"])
        assert len(reason) > 20


def test_sam_attends_over_all_tokens_in_some_blocks_alone() -> None:
    vit = tiny("samvit_base_patch16")
    assert "windows of 2 x 2 tokens" in vit.layout.absent["blocks.0.attn.pattern"]
    assert vit.sites()["blocks.1.attn.pattern"].shape == (4, 15, 15)
    assert vit.sites()["blocks.1.attn.q"].shape == (15, 4, 8)


def test_shrinking_keeps_what_differs_between_blocks() -> None:
    sapiens = shrunk("vit_large_patch16_sapiens2")
    assert [block.attn.num_kv_groups for block in sapiens.blocks] == [1, 2, 1]
    sam = shrunk("samvit_base_patch16")
    assert [block.window_size for block in sam.blocks] == [2, 0, 2]
    assert shrunk("vit_small_patch16_rope_mixed_224").rope_mixed
    assert shrunk("beit_base_patch16_224").blocks[0].attn.relative_position_bias_table is not None


SWEPT = (
    "resid_pre",
    "attn.q",
    "attn.pattern",
    "attn.z",
    "attn.result",
    "attn_out",
    "resid_mid",
    "mlp_out",
    "resid_post",
)


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_growing_and_skipping_agree_with_one_run_at_a_time(name: str) -> None:
    vit = tiny(name)
    base, source = images(vit, 1), images(vit, 2)
    last = f"blocks.{vit.layout.n_layers - 1}.resid_post"
    ends = (0, vit.layout.n_layers - 1)
    sites = [f"blocks.{layer}.{name}" for layer in ends for name in SWEPT]
    sites = [site for site in sites if site not in vit.layout.absent]
    _, values = vit.run(source, capture=sites)
    patches = [0, 2]
    positions = [len(vit.layout.tokens.prefix) + patch for patch in patches]
    runs = [
        run
        for site in sites
        for run in (
            Run(
                name=f"{site} interchanged",
                interventions=[vmi.Interchange(site=site, tokens=patches, source="source")],
                capture=[last],
            ),
            Run(name=f"{site} ablated", interventions=[vmi.Ablate(site=site)], capture=[last]),
        )
    ]
    results = vmi.execute(vit, runs, {"base": base, "source": source}, progress=False)

    def interchanged(site: str, value: torch.Tensor) -> torch.Tensor:
        new = value.clone()
        if site.endswith("pattern"):
            new[:, :, positions] = values[site][:, :, positions]
        else:
            new[:, positions] = values[site][:, positions]
        return new

    clean, cache = vit.run(base, capture=[last])
    stream = cache[last]
    for site in sites:
        edits = {
            "interchanged": lambda value, site=site: interchanged(site, value),
            "ablated": torch.zeros_like,
        }
        for what, edit in edits.items():
            with vit.hooks({site: edit}):
                output, cache = vit.run(base, capture=[last])
            found = results[f"{site} {what}"]
            scale = max(float(output.abs().max()), float(clean.abs().max()))
            assert float((found - output).abs().max()) <= 1e-5 * scale, (site, what)
            kept = results.captures[f"{site} {what}"][last]
            assert float((kept - cache[last]).abs().max()) <= 1e-5 * max(1.0, float(cache[last].abs().max()))
            assert float((kept - stream).abs().max()) > 1e-4 * float(stream.abs().max()), (site, what)
