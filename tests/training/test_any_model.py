"""Any supported model in training: a fresh head, the stimuli's grid, and a folder that loads again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vit_mechinterp as vmi
from tests.training.test_training import lines_of, tiny
from vit_mechinterp.errors import SpecError, UnsupportedModelError
from vit_mechinterp.stimuli import DiscriminationGenerator, discrimination
from vit_mechinterp.stimuli.render import Normalization
from vit_mechinterp.training import (
    TrainingConfig,
    build_vit,
    evaluate,
    load_trained,
    train,
    with_two_way_head,
)
from vit_mechinterp.training.models import normalization_of

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}


def clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, projection_dim=24))


def bare_clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**SIZES))


def whole_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return CLIPModel(CLIPConfig(vision_config=SIZES, text_config={**text, "vocab_size": 9}, projection_dim=24))


def bare_vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**SIZES))


def classifier() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SIZES, num_labels=7))


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**{**SIZES, "image_size": 48}, mlp_ratio=2))


def mae() -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    decoder = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
    return ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **decoder, decoder_intermediate_size=8))


def siglip() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**SIZES))


def settings(model: str, **changes: Any) -> TrainingConfig:
    short = {"steps": 2, "validate_every": 1, "validation_images": 8, "test_images": 16, "log_every": 1}
    usual = {"auxiliary_weight": 0.0, "test_splits": ["test"]}
    return tiny(model=model, **{**short, **usual, **changes})


HF: dict[str, Callable[[], nn.Module]] = {
    maker.__name__: maker
    for maker in (clip, bare_clip, whole_clip, bare_vit, classifier, dinov2, mae, siglip)
}


@pytest.mark.parametrize("kind", HF)
def test_a_transformers_model_is_tuned_and_loads_again(kind: str, tmp_path: Path) -> None:
    HF[kind]().save_pretrained(tmp_path / "own")
    changes = {"model_options": {"mask_ratio": 0.0}} if kind == "mae" else {}
    config = settings(f"hf/{tmp_path}/own", learning_rate=1e-2, **changes)
    result = train(config, tmp_path / "run", progress=False)
    again = vmi.load(f"hf/{result.folder}")
    assert again.layout.tokens.image_size == (32, 32)
    assert tuple(again(again.blank(1)).shape) == (1, 2)

    # What is loaded is what was evaluated, given images as its own preprocessing makes them.
    data = discrimination("test", 16, canvas=32, patch=8, cell=8, progress=False)
    scaled = DiscriminationGenerator(
        "test", canvas=32, patch=8, cell=8, normalization=normalization_of(again)
    )
    torch.testing.assert_close(
        again.preprocess(list(data["base"])), scaled.batch(0, 16).images(), rtol=0, atol=1e-5
    )
    assert evaluate(again, scaled, 16) == result.test["test"]
    if kind in ("clip", "bare_vit"):
        assert normalization_of(again) == (normalization_of(vmi.load(f"hf/{tmp_path}/own")))
        assert (normalization_of(again) == Normalization()) == (kind == "bare_vit")

    # The weights are the pretrained ones, and training moved them.
    own = vmi.load(f"hf/{tmp_path}/own", **changes.get("model_options", {}))
    fresh = build_vit(config)
    site = "blocks.1.resid_post"
    images = scaled.batch(0, 4).images()
    with torch.no_grad():
        before, started, after = (
            vit.run(images, capture=[site])[1][site] for vit in (vmi.wrap(own, image_size=32), fresh, again)
        )
    torch.testing.assert_close(started, before)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("timm/vit_tiny_patch16_224", {"model_options": SMALL}),
        ("timm/deit_tiny_patch16_224", {"model_options": SMALL}),
        ("torchvision/vit_b_16", {"canvas": 64, "patch": 16, "cell": 16}),
    ],
)
def test_other_libraries_are_trained_from_scratch_and_load_again(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    if name.startswith("torchvision/"):
        from torchvision.models import vision_transformer

        sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
        patch = pytest.MonkeyPatch()
        original = vision_transformer._vision_transformer
        patch.setattr(
            vision_transformer, "_vision_transformer", lambda **given: original(**{**given, **sizes})
        )
    try:
        config = settings(name, pretrained=False, **changes)
        result = train(config, tmp_path / "run", progress=False)
        again = load_trained(result.folder)
    finally:
        if name.startswith("torchvision/"):
            patch.undo()
    geometry = {key: getattr(config, key) for key in ("canvas", "patch", "cell")}
    images = DiscriminationGenerator("test", **geometry, normalization=normalization_of(again))
    assert evaluate(again, images, 16) == result.test["test"]
    if name.startswith("timm/"):
        loaded = vmi.load(f"timm/{result.folder}")
        blank = torch.rand(2, 3, config.canvas, config.canvas)
        assert torch.equal(loaded(blank), again(blank))
        data = discrimination("test", 2, **geometry, progress=False)
        assert torch.equal(loaded.preprocess(list(data["base"])), images.batch(0, 2).images())


def test_a_folder_of_timm_keeps_the_arguments_it_was_made_with(tmp_path: Path) -> None:
    first = train(tiny(steps=2, test_images=8), tmp_path / "first", progress=False)
    config = settings(f"timm/{first.folder}", task="rmts", learning_rate=1e-2)
    result = train(config, tmp_path / "second", progress=False)
    arguments = json.loads((result.folder / "config.json").read_text())["model_args"]
    assert arguments["depth"] == 2
    start, end = (vmi.load(str(folder)).module.parameters() for folder in (first.folder, result.folder))
    assert any(not torch.equal(a, b) for a, b in zip(start, end, strict=True))


def test_a_training_with_a_head_is_resumed_exactly(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    clip().save_pretrained(tmp_path / "own")
    config = settings(f"hf/{tmp_path}/own", steps=3, schedule="plateau", patience=1, train_images=16)
    train(config, tmp_path / "whole", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        from vit_mechinterp.training import loop

        calls = iter(range(10))

        def stopped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        original = loop.objective
        patch.setattr(loop, "objective", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", progress=False)
    train(config, tmp_path / "cut", resume=True, progress=False)
    for name in ("model.safetensors", "state/state.safetensors"):
        whole, cut = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name


def test_every_loss_goes_down_in_a_transformers_model(tmp_path: Path) -> None:
    bare_vit().save_pretrained(tmp_path / "own")
    config = settings(
        f"hf/{tmp_path}/own", auxiliary_weight=1.0, steps=16, learning_rate=1e-2, validate_every=16,
        train_images=8, pipeline=[{"attention": "within_object", "layers": [0]}], cell=16,
    )  # fmt: skip
    train(config, tmp_path / "run", progress=False)
    lines = [line for line in lines_of(tmp_path / "run") if "task_loss" in line]
    for name in ("probe_shape", "probe_color", "pipeline_loss"):
        assert lines[-1][name] < lines[0][name] - 0.02


@pytest.mark.parametrize(("probe", "name"), [("cls", "probe_relation"), ("control", "probe_identity")])
def test_other_probes_are_trained_with_the_model(probe: str, name: str, tmp_path: Path) -> None:
    config = tiny(task="rmts", auxiliary_probe=probe, steps=12, validate_every=12, log_every=1, train_images=8)
    train(config, tmp_path / "run", progress=False)
    lines = [line for line in lines_of(tmp_path / "run") if name in line]
    assert lines[-1][name] < lines[0][name]
    assert f"{name}_accuracy" in lines[0]


def test_the_heads_seed_decides_it_and_nothing_else_moves(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path / "own")
    state = torch.get_rng_state()
    models = [build_vit(settings(f"hf/{tmp_path}/own", seed=seed)).module.state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    same = [name for name in models[0] if torch.equal(models[0][name], models[1][name])]
    other = [name for name in models[0] if not torch.equal(models[0][name], models[2][name])]
    assert same == list(models[0])
    assert other == ["visual_projection.weight"]


def test_positions_can_be_drawn_anew_as_the_authors_do(tmp_path: Path) -> None:
    dinov2().save_pretrained(tmp_path / "own")
    config = settings(f"hf/{tmp_path}/own", fresh_positions=True)
    first = build_vit(config)
    own, ours = (
        vit.module.state_dict() for vit in (vmi.load(f"hf/{tmp_path}/own"), first)
    )
    assert own["embeddings.position_embeddings"].shape == (1, 37, 16)
    assert ours["dinov2.embeddings.position_embeddings"].shape == (1, 17, 16)
    assert torch.equal(own["embeddings.cls_token"], ours["dinov2.embeddings.cls_token"])
    result = train(config, tmp_path / "run", progress=False)
    again = vmi.load(f"hf/{result.folder}")
    images = DiscriminationGenerator("test", canvas=32, patch=8, cell=8, normalization=normalization_of(again))
    assert evaluate(again, images, 16) == result.test["test"]
    bare_vit().save_pretrained(tmp_path / "fixed")
    with pytest.raises(SpecError, match=r"ViTForImageClassification does not\. Leave it out"):
        build_vit(settings(f"hf/{tmp_path}/fixed", fresh_positions=True))


def test_models_that_do_not_fit_are_named_before_the_first_step(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path / "own")
    with pytest.raises(SpecError, match=r"sees images of 32 x 32 px as .*; the stimuli are 64 px wide"):
        train(settings(f"hf/{tmp_path}/own", canvas=64), tmp_path / "a", progress=False)
    with pytest.raises(SpecError, match="no model string"):
        train(settings("own"), tmp_path / "b", progress=False)
    assert not (tmp_path / "a").exists()

    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    headless = vmi.wrap(DINOv3ViTModel(DINOv3ViTConfig(**SIZES)))
    with pytest.raises(UnsupportedModelError, match=r"DINOv3ViTModel cannot be given a two-way head: transform"):
        with_two_way_head(headless)


def test_open_clip_is_refused_by_name() -> None:
    import open_clip

    vit = vmi.wrap(open_clip.model.VisionTransformer(32, 8, 16, 2, 2, 2.0, output_dim=8))
    with pytest.raises(UnsupportedModelError, match="this one is of open_clip"):
        with_two_way_head(vit)
