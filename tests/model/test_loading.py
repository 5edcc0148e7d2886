"""Loading by one string, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import transformers
from PIL import Image

import vit_mechinterp as vmi
from tests.model.raw import near
from tests.model.zoo import CLIP, DINO, TRANSFORMERS, hf, two_towers
from vit_mechinterp.errors import SpecError, TensorFileError, UnsupportedModelError
from vit_mechinterp.model.loading import checkpoints


def same(vit: vmi.HookedViT, module: torch.nn.Module) -> None:
    """The loaded model computes what the saved one does."""
    x = torch.randn(2, 3, *vit.layout.tokens.image_size)
    with torch.no_grad():
        native = module.eval()(x)
        native = native if isinstance(native, torch.Tensor) else native[vit.layout.output]
        assert torch.equal(vit(x), native)


def saved_timm(folder: Path) -> torch.nn.Module:
    """A timm folder, as timm's own local-dir scheme has it."""
    options = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    module = timm.create_model("vit_tiny_patch16_224", **options)
    folder.mkdir()
    safetensors.torch.save_file(module.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": {key: value for key, value in options.items() if key != "num_classes"},
        "pretrained_cfg": {"input_size": [3, 64, 64], "fixed_input_size": True},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return module


@pytest.mark.parametrize("variant", [v for v in TRANSFORMERS if v.name != "CLIPModel.vision_model"], ids=str)
def test_transformers_folders(variant: object, tmp_path: Path) -> None:
    module = variant.module()  # type: ignore[attr-defined]
    module.save_pretrained(tmp_path)
    vit = vmi.load(f"hf/{tmp_path}")
    assert not vit.module.training
    assert type(vit.module) is type(module)
    assert vit.source == f"hf/{tmp_path}"
    same(vit, module)


def test_folders_may_be_relative_to_here_and_to_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = hf("ViTForImageClassification", "ViTConfig")()
    module.save_pretrained(tmp_path / "my-vit")
    saved_timm(tmp_path / "my-timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (".", "~"):
        same(vmi.load(f"hf/{place}/my-vit"), module)
        assert vmi.load(f"timm/{place}/my-timm").layout.tokens.grid == (4, 4)


def test_a_relative_folder_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    hf("ViTModel", "ViTConfig")().save_pretrained(tmp_path / "m")
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size, image_mean=[0.1] * 3, image_std=[0.2] * 3).save_pretrained(tmp_path / "m")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    models = [vmi.load("hf/./m"), vmi.load("hf/~/m")]
    monkeypatch.chdir(tmp_path / "elsewhere")
    black = Image.new("RGB", (32, 32))
    for vit, source in zip(models, ("hf/./m", "hf/~/m"), strict=True):
        assert vit.source == source
        assert vit.origin == f"hf/{tmp_path / 'm'}"
        assert vit.preprocess([black]).flatten()[0] == pytest.approx(-0.5)


def test_no_string_is_no_model() -> None:
    with pytest.raises(SpecError, match="None is no model string"):
        vmi.load(None)  # type: ignore[arg-type]


def test_a_checkpoint_of_two_towers_gives_the_vision_tower(tmp_path: Path) -> None:
    module = two_towers("CLIPModel")().eval()
    module.save_pretrained(tmp_path)
    vit = vmi.load(f"hf/{tmp_path}")
    assert type(vit.module).__name__ == "CLIPVisionModelWithProjection"
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(vit(x), vit.module(x).image_embeds)
        # This copy of the weights lies elsewhere in memory; on some CPUs the last bits depend on where.
        near(vit(x), module.get_image_features(x).pooler_output)
    random = vmi.load(f"hf/{tmp_path}", pretrained=False)
    assert type(random.module) is type(vit.module)
    assert random.fingerprint() != vit.fingerprint()


def test_timm_folders(tmp_path: Path) -> None:
    module = saved_timm(tmp_path / "my-vit")
    vit = vmi.load(f"timm/{tmp_path}/my-vit")
    same(vit, module)
    assert vit.preprocess([Image.new("RGB", (90, 70))]).shape == (1, 3, 64, 64)
    assert vmi.load(f"timm/{tmp_path}/my-vit", pretrained=False).fingerprint() != vit.fingerprint()


def test_a_folder_without_a_dot_is_told_how_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dinov3").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=r"'dinov3' is no model string\. There is a folder .*: write './dinov3'"):
        vmi.load("dinov3")


def test_names_without_weights() -> None:
    torch.manual_seed(0)
    vit = vmi.load("timm/test_vit", pretrained=False, num_classes=7, check=True)
    assert vit.sites()["logits"].shape == (7,)
    assert not vit.module.training
    assert str(vit.layout).startswith("timm.vit: 6 blocks, 2 heads of 32")


def test_shipped_checkpoints_are_listed_and_load() -> None:
    assert checkpoints()
    with pytest.raises(SpecError) as raised:
        vmi.load(f"vmi/{checkpoints()[0][:-1]}")
    text = str(raised.value)
    assert f"Close matches: {checkpoints()[0]}" in text
    assert text.endswith(f"It ships: {', '.join(checkpoints())}.")
    vit = vmi.load(f"vmi/{checkpoints()[0]}", pretrained=False)
    assert vit.layout.tokens.grid == (8, 8)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "huggingface/x", "hf/", "timm", ""])
def test_other_strings(name: str) -> None:
    with pytest.raises(SpecError) as raised:
        vmi.load(name)
    text = str(raised.value)
    assert text.startswith(f"{name!r} is no model string.")
    assert (" Close matches: 'timm/vit_base_patch16_224', " in text) == (name == "vit_base_patch16_224")
    assert "Write 'timm/NAME', 'hf/ORG/NAME', a folder as 'hf/./FOLDER'" in text
    assert text.endswith(f"{', '.join(checkpoints())}.")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "timm/vit_base_patch16_225",
            r"timm has no model 'vit_base_patch16_225'\. Close matches: 'timm/vit_base_patch16_224'",
        ),
        ("timm/resnet5O", r"timm has no model 'resnet5O'\. Close matches: .*resnet50.* 'vit-mechinterp models'"),
        ("timm/dinov2-base", r"timm has no model 'dinov2-base'\. Close matches: 'hf/facebook/dinov2-base'"),
        ("hf/ViTModel", r"could not be loaded: .*\. Close matches: 'hf/google/vit-base-patch16-224'"),
        ("dinov3", r"'dinov3' is no model string\. Close matches: .*dinov3"),
        (
            "hf/facebook/dinov2-bse",
            r"could not be loaded: .*\. Close matches: 'hf/facebook/dinov2-base', .*Check the name",
        ),
        (
            "timm/vit_base_patch16_224.nonsense",
            r"timm has no weights 'nonsense' of vit_base_patch16_224\. It has: .*augreg_in1k, .*\.$",
        ),
        (
            "timm/./no-such-folder",
            r"no-such-folder has no config\.json; a timm folder holds config\.json and model\.safetensors",
        ),
        (
            "timm/vit_base_patch16_224.augreg_in1",
            r"timm has no weights 'augreg_in1' of vit_base_patch16_224\. Close matches: augreg_in1k,",
        ),
        (
            "timm/facebook/dinov2-base",
            r"its names have no slash.*write 'hf/facebook/dinov2-base', or 'timm/hf-hub:facebook/dinov2-base'",
        ),
        (
            "./no-such-folder",
            r"'\./no-such-folder' is no folder with a model: its config\.json cannot be read \(No such file",
        ),
        (
            "hf/./no-such-folder",
            r"no-such-folder has no config\.json; a transformers folder is one that save_pretrained wrote",
        ),
        (
            "hf/nobody/no-such-model",
            r"'hf/nobody/no-such-model' could not be loaded: .*Check the name, or give a local folder",
        ),
    ],
)
def test_names_that_load_nothing(name: str, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        vmi.load(name)


def test_damaged_weights(tmp_path: Path) -> None:
    hf("ViTModel", "ViTConfig")().save_pretrained(tmp_path / "hf")
    saved_timm(tmp_path / "timm")
    for library in ("hf", "timm"):
        weights = tmp_path / library / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(
            TensorFileError, match=r"its weights are no readable safetensors file \(truncated or damaged\?\)"
        ):
            vmi.load(f"{library}/{tmp_path / library}")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    saved_timm(tmp_path / "timm")
    with pytest.raises(SpecError, match=r"could not be loaded: Error.*in loading state_dict"):
        vmi.load(f"timm/{tmp_path}/timm", embed_dim=48)


def test_a_folder_alone_is_of_the_library_that_its_configuration_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = saved_timm(tmp_path / "mine")
    other = hf("ViTModel", "ViTConfig")()
    other.save_pretrained(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    vit = vmi.load("./mine")
    same(vit, own)
    assert vit.source == "timm/./mine"
    same(vmi.load(str(tmp_path / "theirs")), other)
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(SpecError, match=r"neither timm's 'architecture' nor transformers' 'model_type'; say which"):
        vmi.load("./mine")
    (tmp_path / "mine" / "config.json").write_text("no json")
    with pytest.raises(SpecError, match=r"its config\.json cannot be read"):
        vmi.load("./mine")


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"code from a model repository is never run \(trust_remote_code\)\. Load the module"
    ):
        vmi.load("hf/somebody/model", trust_remote_code=True)
    module = hf("ViTModel", "ViTConfig")()
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config["model_type"] = "evil"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(SpecError, match="could not be loaded"):
        vmi.load(f"hf/{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_models_that_are_no_vits(tmp_path: Path) -> None:
    transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"BertModel\. Probed:"):
        vmi.load(f"hf/{tmp_path}")


def test_eager_attention_is_seen_everywhere(tmp_path: Path) -> None:
    hf("ViTModel", "ViTConfig")().save_pretrained(tmp_path)
    for pretrained in (True, False):
        vit = vmi.load(f"hf/{tmp_path}", pretrained=pretrained, attn_implementation="eager")
        assert vit.module.config._attn_implementation == "eager"
        images = torch.randn(2, *vit.layout.tokens.input_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            _, eager = vit.run(images, ["*"])
            vit.module.set_attn_implementation("sdpa")
            _, fused = vit.run(images, ["*"])
        assert set(eager) == set(fused)
        for site, value in eager.items():
            torch.testing.assert_close(value, fused[site], rtol=1e-4, atol=1e-5)


def test_models_of_any_size_take_what_their_preprocessing_makes(tmp_path: Path) -> None:
    hf("Dinov2Model", "Dinov2Config", DINO)().save_pretrained(tmp_path)
    assert vmi.load(f"hf/{tmp_path}").layout.tokens.image_size == (32, 32)
    size = {"height": 48, "width": 48}
    transformers.BitImageProcessor(size={"shortest_edge": 56}, crop_size=size).save_pretrained(tmp_path)
    vit = vmi.load(f"hf/{tmp_path}")
    assert vit.layout.tokens.image_size == (48, 48)
    assert vit.layout.tokens.grid == (6, 6)
    assert vit.preprocess([Image.new("RGB", (90, 70))]).shape == (1, 3, 48, 48)
    assert vmi.load(f"hf/{tmp_path}", image_size=(32, 40)).layout.tokens.grid == (4, 5)
    hf("CLIPVisionModel", "CLIPVisionConfig", CLIP)().save_pretrained(tmp_path / "clip")
    with pytest.raises(SpecError, match=r"takes no images of 40 x 40 pixels: .* It is made for 32 x 32"):
        vmi.load(f"hf/{tmp_path}/clip", image_size=40)


def test_weights_that_are_missing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf("ViTForImageClassification", "ViTConfig")().save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["classifier.bias"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    vmi.load(f"hf/{tmp_path}")
    assert f"{tmp_path} lacks classifier.bias, which are initialised at random." in caplog.text


def test_options_go_to_the_library(tmp_path: Path) -> None:
    hf("ViTForImageClassification", "ViTConfig")().save_pretrained(tmp_path)
    vit = vmi.load(f"hf/{tmp_path}", num_labels=9, ignore_mismatched_sizes=True, dtype=torch.bfloat16)
    assert vit.dtype == torch.bfloat16
    assert vit.sites()["logits"].shape == (9,)
