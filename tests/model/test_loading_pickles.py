"""Weights in pickles: refused before anything is read, with what to do, and read when they are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

import vit_mechinterp as vmi
from tests.model.zoo import hf
from vit_mechinterp.errors import SpecError, UnsupportedModelError

OPTIONS: dict[str, Any] = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 3}
WHY = r"That format is a pickle, which can run code when it is read"


@pytest.fixture(autouse=True)
def unpickled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file that torch unpickles."""
    read: list[str] = []
    load = torch.load  # noqa: TID251

    def noting(file: Any, *args: Any, **options: Any) -> Any:
        read.append(Path(str(file)).name)
        return load(file, *args, **options)

    monkeypatch.setattr(torch, "load", noting)
    return read


def tiny() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **OPTIONS).eval()


def folder_of_timm(folder: Path, module: nn.Module, weights: str) -> Path:
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": OPTIONS}
    folder.mkdir(parents=True, exist_ok=True)
    pretrained = {"input_size": [3, 64, 64], "fixed_input_size": True, "num_classes": 5}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pretrained}))
    save(module, folder / weights)
    return folder


def save(module: nn.Module, file: Path) -> None:
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(module.state_dict(), file)
    else:
        torch.save(module.state_dict(), file)  # noqa: TID251


def same(vit: vmi.HookedViT, module: nn.Module) -> None:
    x = torch.randn(1, 3, *vit.layout.tokens.image_size)
    with torch.no_grad():
        assert torch.equal(vit(x), module(x))


def test_a_timm_folder(tmp_path: Path, unpickled: list[str]) -> None:
    module = tiny()
    folder = folder_of_timm(tmp_path, module, "pytorch_model.bin")
    with pytest.raises(SpecError, match=WHY) as raised:
        vmi.load(f"timm/{folder}")
    assert str(raised.value) == (
        f"{folder} has its weights in pytorch_model.bin and not in safetensors. That format is a pickle, which can "
        "run code when it is read, so it is not read unless you ask for it. If you trust where it comes from, load "
        "it once with allow_pickle=True, keep it with "
        "timm.models.save_for_hf(vit.module, FOLDER, safe_serialization=True), and load that folder from then on."
    )
    assert unpickled == []
    vit = vmi.load(f"timm/{folder}", allow_pickle=True)
    same(vit, module)
    assert unpickled == ["pytorch_model.bin"]
    # What the message advises works.
    timm.models.save_for_hf(vit.module, tmp_path / "kept", safe_serialization=True)
    same(vmi.load(f"timm/{tmp_path}/kept"), module)
    assert unpickled == ["pytorch_model.bin"]


def test_a_timm_folder_with_both_is_read_from_safetensors(tmp_path: Path, unpickled: list[str]) -> None:
    module = tiny()
    folder = folder_of_timm(tmp_path, tiny(), "pytorch_model.bin")  # timm itself prefers this name
    save(module, folder / "best.safetensors")
    same(vmi.load(f"timm/{folder}"), module)
    assert unpickled == []
    save(tiny(), folder / "last.safetensors")
    with pytest.raises(SpecError, match=r"has best\.safetensors, last\.safetensors; call the one that is meant model"):
        vmi.load(f"timm/{folder}")
    for file in folder.glob("*.[!j]*"):
        file.unlink()
    with pytest.raises(SpecError, match=r"has no model\.safetensors; pretrained=False needs no weights"):
        vmi.load(f"timm/{folder}")


def test_a_transformers_folder(tmp_path: Path, unpickled: list[str]) -> None:
    module = hf("ViTForImageClassification", "ViTConfig")().eval()
    module.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")  # noqa: TID251
    with pytest.raises(SpecError, match=WHY) as raised:
        vmi.load(f"hf/{tmp_path}")
    assert f"'hf/{tmp_path}' has its weights in pytorch_model.bin" in str(raised.value)
    assert "keep it with vit.module.save_pretrained(FOLDER)" in str(raised.value)
    with pytest.raises(SpecError, match="ask for them with allow_pickle=True"):
        vmi.load(f"hf/{tmp_path}", use_safetensors=False)
    assert unpickled == []
    vit = vmi.load(f"hf/{tmp_path}", allow_pickle=True)
    x = torch.randn(1, 3, *vit.layout.tokens.image_size)
    with torch.no_grad():
        assert torch.equal(vit(x), module(x).logits)
    assert unpickled == ["pytorch_model.bin"]
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(SpecError, match="could not be loaded"):
        vmi.load(f"hf/{tmp_path}")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_that_options_name(suffix: str, tmp_path: Path, unpickled: list[str]) -> None:
    module = tiny()
    file = tmp_path / f"weights.{suffix}"
    save(module, file)
    options = {**OPTIONS, "num_classes": 5}
    overlay = {"file": str(file), "num_classes": 5, "input_size": (3, 64, 64)}
    for given in ({"checkpoint_path": str(file)}, {"pretrained_cfg_overlay": overlay}):
        if suffix == "pth":
            with pytest.raises(SpecError, match=WHY):
                vmi.load("timm/vit_tiny_patch16_224", **given, **options)
            assert unpickled == []
        vit = vmi.load("timm/vit_tiny_patch16_224", allow_pickle=suffix == "pth", **given, **options)
        same(vit, module)
        assert unpickled == (["weights.pth"] if suffix == "pth" else [])
        unpickled.clear()


def cached(cache: Path, repository: str, *files: Path) -> str:
    """A repository in a cache of the hub's, as if downloaded."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file.name).write_bytes(file.read_bytes())
    return str(cache)


TAGGED = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_name_whose_weights_were_downloaded_before(suffix: str, tmp_path: Path, unpickled: list[str]) -> None:
    file = tmp_path / {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[suffix]
    module = timm.create_model("vit_tiny_patch16_224", **OPTIONS).eval()
    save(module, file)
    cache = cached(tmp_path / "cache", f"timm/{TAGGED}", file)
    if suffix == "bin":
        with pytest.raises(SpecError, match=rf"The repository timm/{TAGGED} of the hub has its weights in pytorch_"):
            vmi.load(f"timm/{TAGGED}", cache_dir=cache, **OPTIONS)
    else:
        same(vmi.load(f"timm/{TAGGED}", cache_dir=cache, **OPTIONS), module)
    assert unpickled == []


def test_nothing_is_known_of_a_name_offline(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=rf"'timm/{TAGGED}' could not be loaded: "):
        vmi.load(f"timm/{TAGGED}", cache_dir=str(tmp_path))


def test_a_repository_without_safetensors_is_refused_before_its_pickle_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def download(repository: str, file: str, **options: Any) -> str:
        asked.append(file)
        raise EntryNotFoundError(f"{repository} has no {file}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(SpecError, match=WHY):
        vmi.load(f"timm/{TAGGED}")
    assert asked == ["model.safetensors"]


def test_an_address_of_a_pickle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = {"hf_hub_id": None, "url": "https://example.org/weights.pth"}
    with pytest.raises(SpecError, match=r"has its weights in https://example\.org/weights\.pth and not in safe"):
        vmi.load(f"timm/{TAGGED}", pretrained_cfg_overlay=overlay)


def test_what_is_no_vit_is_refused_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise AssertionError("something was downloaded")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UnsupportedModelError, match=r"resnet\.ResNet\. Probed:"):
        vmi.load("timm/resnet18.a1_in1k")
    with pytest.raises(UnsupportedModelError) as raised:
        vmi.load("timm/twins_svt_small")
    assert ". Probed:\n  timm.sam, timm.vit" in str(raised.value)
    assert "Nearest is timm." in str(raised.value)
