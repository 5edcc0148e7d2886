"""Every vision tower of open_clip that is a ViT, tiny: it conforms, and it loads with the weights of its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.factory import get_model_config
from open_clip.model import _build_vision_tower
from PIL import Image
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.tiny_models import stirred
from vit_mechinterp.errors import SpecError, UnsupportedModelError
from vit_mechinterp.model.conformance import check

TINY: dict[str, Any] = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 1.5}
# What configurations set beside sizes; every kind of tower keeps its own.
KINDS = ("ls_init_value", "attentional_pool", "no_ln_pre", "pool_type", "final_ln_after_pool", "output_tokens")


def own_towers() -> dict[str, dict[str, Any]]:
    """The vision configurations of open_clip whose tower is its own ViT, by name."""
    configs = {name: get_model_config(name)["vision_cfg"] for name in open_clip.list_models()}
    return {
        name: vision
        for name, vision in configs.items()
        if "timm_model_name" not in vision and isinstance(vision["layers"], int)
    }


def tower(image_size: int | tuple[int, int] = (16, 24), **vision: Any) -> nn.Module:
    """A tiny tower that keeps the options that make it different."""
    torch.manual_seed(0)
    options = {**TINY, "image_size": image_size, **vision}
    if options.get("attentional_pool"):
        options |= {"attn_pooler_heads": 4, "attn_pooler_queries": 6}
    return stirred(_build_vision_tower(20, options)).eval()


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or (16, 24)), generator=torch.Generator().manual_seed(1))


OWN = own_towers()


def kinds(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, options[key]) for key in KINDS if key in options))


@pytest.mark.zoo
@pytest.mark.parametrize("kind", dict.fromkeys(map(kinds, OWN.values())), ids=str)
@pytest.mark.parametrize("act", [False, True], ids=["gelu", "quick gelu"])
def test_every_kind_of_tower_conforms(kind: tuple[tuple[str, Any], ...], act: bool) -> None:
    torch.manual_seed(0)
    options = {**TINY, "image_size": (16, 24), **dict(kind)}
    if options.get("attentional_pool"):
        options |= {"attn_pooler_heads": 4, "attn_pooler_queries": 6}
    report = check(vmi.wrap(stirred(_build_vision_tower(20, options, quick_gelu=act)).eval()))
    assert report.passed, str(report)


@pytest.mark.zoo
@pytest.mark.parametrize("name", OWN)
def test_every_configuration_is_described(name: str) -> None:
    """At full size, without memory: nothing but the sizes differs from the kinds above."""
    with torch.device("meta"):
        vit = vmi.wrap(_build_vision_tower(get_model_config(name)["embed_dim"], OWN[name]))
    config = OWN[name]
    assert vit.layout.family.name == "open_clip.vit"
    assert (vit.layout.n_layers, vit.layout.d_model) == (config["layers"], config["width"])
    assert vit.layout.n_heads == config["width"] // config.get("head_width", 64)
    assert vit.layout.tokens.prefix == ("cls",)


CUSTOM = {
    "norms and scales inside": {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_fc": True},
    "a norm behind attention": {"scale_attn": True},
    "plain": {"block_type": "custom"},
}  # fmt: skip


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_blocks_conform(name: str) -> None:
    vit = vmi.wrap(tower(**CUSTOM[name]))
    assert vit.layout.family.name == "open_clip.vit_custom"
    assert ("blocks.0.attn.result" in vit.layout.absent) == (name == "a norm behind attention")
    report = check(vit)
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("options", "output", "absent"),
    [
        ({}, "image_embeds", ("pooled",)),
        ({"pool_type": "avg", "final_ln_after_pool": True}, "image_embeds", ("ln_final",)),
        ({"attentional_pool": True, "output_tokens": True}, "image_embeds", ("ln_final", "pooled")),
        ({"pool_type": "none"}, "projected_tokens", ("pooled",)),
    ],
)
def test_what_goes_out(options: dict[str, Any], output: str, absent: tuple[str, ...]) -> None:
    module = tower(**options)
    vit = vmi.wrap(module)
    assert vit.layout.output == output
    assert tuple(site for site in ("ln_final", "pooled", "logits") if site in vit.layout.absent) == absent
    native = module(images())
    assert torch.equal(vit(images()), native[0] if isinstance(native, tuple) else native)
    report = check(vit)
    assert report.passed, str(report)


def test_a_tower_without_its_projection() -> None:
    module = tower()
    module.prune_intermediate_layers(2)
    vit = vmi.wrap(module)
    assert vit.layout.output == "pooled"
    assert vit.layout.absent["logits"] == "the model has no projection"
    assert check(vit).passed


TRUNKS = {
    "behind a projection": {"timm_proj": "linear"},
    "behind a small network": {"timm_proj": "mlp"},
    "whose own head projects": {"timm_proj": None, "timm_pool": "token"},
    "alone": {"timm_proj": "none", "timm_pool": "token"},
}


@pytest.mark.parametrize("name", TRUNKS)
def test_a_timm_trunk_is_read_by_its_own_row(name: str) -> None:
    torch.manual_seed(0)
    options = {"timm_model_name": "test_vit", "image_size": 160, **TRUNKS[name]}
    module = stirred(_build_vision_tower(20, options)).eval()
    vit = vmi.wrap(module)
    assert vit.layout.family.name == "open_clip.timm(timm.vit)"
    assert vit.layout.output == ("pooled" if name == "alone" else "image_embeds")
    x = images(160, 160)
    output, cache = vit.run(x, capture=["blocks.*.attn.pattern", "pooled"])
    assert torch.equal(vit(x), module(x))
    assert float(output.abs().max()) > 0
    assert cache["pooled"].shape == (2, 64)
    report = check(vit)
    assert report.passed, str(report)


def test_models_of_two_towers_and_text_towers_are_refused() -> None:
    clip = small_model()
    with pytest.raises(UnsupportedModelError, match="it also holds a text tower; wrap its visual"):
        vmi.wrap(clip)
    custom = open_clip.CustomTextCLIP(**small_config())
    with pytest.raises(UnsupportedModelError, match="it also holds a text tower; wrap its visual"):
        vmi.wrap(custom)
    with pytest.raises(UnsupportedModelError, match="it takes no images"):
        vmi.wrap(custom.text)


def small_config() -> dict[str, Any]:
    text = {"context_length": 8, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
    return {"embed_dim": 20, "vision_cfg": {**TINY, "image_size": 16}, "text_cfg": text}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return stirred(open_clip.CLIP(**small_config())).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in open_clip's format, and the model that it was saved from."""
    from safetensors.torch import save_file

    images = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "resize_mode": "squash", "interpolation": "bilinear"}
    config = {"model_cfg": small_config(), "preprocess_cfg": images}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(small_model().state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


def test_a_folder_loads_with_the_weights_of_its_vision_tower(folder: Path) -> None:
    vit = vmi.load(f"open_clip/{folder}")
    x = images(16, 16)
    assert torch.equal(vit(x), small_model().visual(x))
    assert float(vit(x).abs().max()) > 0.1
    picture = Image.effect_noise((40, 24), 80).convert("RGB")
    own = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    assert torch.equal(vit.preprocess([picture])[0], own(picture))
    assert vit.preprocess.geometry.unknown is None


def test_a_file_loads_into_a_named_architecture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip import factory
    from safetensors.torch import save_model

    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", small_config())
    both = vmi.load("open_clip/tiny", checkpoint_path=folder / "open_clip_model.safetensors")
    save_model(both.module, str(folder / "tower.safetensors"))
    tower = vmi.load("open_clip/tiny", checkpoint_path=folder / "tower.safetensors")
    x = images(16, 16)
    assert torch.equal(both(x), small_model().visual(x))
    assert torch.equal(tower(x), both(x))
    assert not torch.equal(vmi.load("open_clip/tiny", pretrained=False)(x), both(x))


def _pickled(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"never read")


def _pickle_beside(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").rename(folder / "model.safetensors")
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"never read")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_pickled, "weights in open_clip_pytorch_model.bin and not in safetensors"),
        (_pickle_beside, "weights in open_clip_pytorch_model.bin and not in safetensors"),
        (lambda folder: (folder / "open_clip_model.safetensors").unlink(), "has no open_clip_model.safetensors"),
        (lambda folder: (folder / "open_clip_config.json").unlink(), "has no open_clip_config.json"),
        (lambda folder: (folder / "open_clip_config.json").write_text("{"), "open_clip_config.json cannot be read"),
    ],
)  # fmt: skip
def test_spoilt_folders_are_refused(folder: Path, spoil: Callable[[Path], object], text: str) -> None:
    spoil(folder)
    with pytest.raises(SpecError) as raised:
        vmi.load(f"open_clip/{folder}")
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ViT-B-23", "open_clip has no model 'ViT-B-23'. Close matches: ViT-B-32"),
        ("ViT-B-32", "has weights of several trainings. Write 'open_clip/ViT-B-32/TAG' with one of openai, "),
        ("ViT-B-32/opena", "has no weights 'opena'. Close matches: openai"),
    ],
)
def test_names_are_refused_with_those_that_there_are(name: str, text: str) -> None:
    with pytest.raises(SpecError) as raised:
        vmi.load(f"open_clip/{name}")
    assert text in str(raised.value)


def test_towers_that_are_no_vit_are_refused_before_anything_is_made() -> None:
    with pytest.raises(UnsupportedModelError, match="ModifiedResNet"):
        vmi.load("open_clip/RN50/openai")
