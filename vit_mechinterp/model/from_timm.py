"""Models by timm's names, from timm's folders and from the hub's, with their weights from safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vit_mechinterp.catalogue import catalogue
from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.model.origins import is_folder, library_of
from vit_mechinterp.model.pickles import is_pickle, pickles_in, refused
from vit_mechinterp.model.registry import foresee

__all__ = ["build"]

SAVE = "timm.models.save_for_hf(vit.module, FOLDER, safe_serialization=True)"


def build(name: str, pretrained: bool, allow_pickle: bool, options: Mapping[str, Any]) -> nn.Module:
    """Make a model by timm's name, ``hf-hub:ORG/NAME``, or from a folder.

    Which file the weights come from is settled first, and timm is handed that file, so that it never falls
    back on another one.

    Raises:
        SpecError: timm knows no such name, or the weights are pickles.
        UnsupportedModelError: no family describes the architecture; nothing was downloaded.
    """
    import timm

    options = dict(options)
    if (checkpoint := options.get("checkpoint_path")) is not None:
        if is_pickle(checkpoint) and not allow_pickle:
            raise refused(f"checkpoint_path={str(checkpoint)!r}", [Path(checkpoint).name], SAVE)
        pretrained = False  # the file holds all weights
    file: Path | None = None
    if is_folder(name):
        file = _file_in_folder(Path(name), allow_pickle) if pretrained else None
        name = f"local-dir:{_with_config(Path(name))}"
    else:
        _known(name)
        if pretrained:
            foresee(lambda: timm.create_model(name, pretrained=False, **_unplaced(options)))
        file = _file_of_name(name, options) if pretrained and not allow_pickle else None
    if file is not None:
        own = {"source": "", "file": str(file), "custom_load": file.suffix == ".npz"}
        options["pretrained_cfg_overlay"] = {**(options.get("pretrained_cfg_overlay") or {}), **own}
    module: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    return module


def _unplaced(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "device"}


def _known(name: str) -> None:
    """Refuse names that timm does not know, with those that it knows."""
    import timm

    if ":" in name:
        return
    if "/" in name:
        raise SpecError(
            f"timm has no model {name!r}: its names have no slash. For a repository of the hub write "
            f"'hf/{name}', or 'timm/hf-hub:{name}' if it is in timm's format."
        )
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = catalogue().near(name) or suggest(architecture, timm.list_models())
        raise SpecError(f"timm has no model {name!r}.{near} 'vit-mechinterp models' lists what is supported.")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tags and tag not in tags:
        raise SpecError(
            f"timm has no weights {tag!r} of {architecture}.{suggest(tag, tags)} It has: {', '.join(tags)}."
        )


def _with_config(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise SpecError(
            f"{folder} has no config.json; a timm folder holds config.json and model.safetensors. A file "
            "with weights alone is read by 'timm/NAME' with checkpoint_path=FILE."
        )
    if library_of(str(folder.resolve())).startswith("hf/"):
        raise SpecError(f"{folder} is a folder of transformers, not of timm: load it as 'hf/{folder}'.")
    return folder


def _file_in_folder(folder: Path, allow_pickle: bool) -> Path | None:
    """The folder's safetensors file; None where timm may read a pickle."""
    found = sorted(_with_config(folder).glob("*.safetensors"))
    usual = [file for file in found if file.name in ("model.safetensors", "open_clip_model.safetensors")]
    if len(usual or found) == 1:
        return (usual or found)[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise SpecError(f"{folder} has {names}; call the one that is meant model.safetensors.")
    if allow_pickle:
        return None
    if files := pickles_in(folder):
        raise refused(str(folder), files, SAVE)
    raise SpecError(f"{folder} has no model.safetensors; pretrained=False needs no weights.")


def _file_of_name(name: str, options: Mapping[str, Any]) -> Path | None:
    """The file with a name's weights, downloaded if need be; None where timm reads no file or its archive."""
    from timm.models import resolve_pretrained_cfg

    overlay = options.get("pretrained_cfg_overlay")
    source, _, place = name.rpartition(":")
    if source:
        from timm.models import load_model_config_from_hf

        found, name, _ = load_model_config_from_hf(place)
    else:
        name, _, tag = name.partition(".")
        found = options.get("pretrained_cfg") or tag
    config = resolve_pretrained_cfg(name, pretrained_cfg=found, pretrained_cfg_overlay=overlay).to_dict()
    if config.get("state_dict") is not None:
        return None
    if file := config.get("file"):
        if is_pickle(file):
            raise refused(f"timm's {name}", [str(file)], SAVE)
        return Path(file)
    if repository := config.get("hf_hub_id"):
        return _file_on_hub(repository, config.get("hf_hub_filename"), options.get("cache_dir"))
    if (address := config.get("url")) and is_pickle(address):
        raise refused(f"timm's {name}", [str(address)], SAVE)
    return None


_SAFE_NAMES = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}


def _file_on_hub(repository: str, file: str | None, cache: str | None) -> Path:
    """A repository's weights in the cache, downloaded if need be, where they are safe to read."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = repository.partition("@")
    file = file or "pytorch_model.bin"
    wanted = _SAFE_NAMES.get(file, str(Path(file).with_suffix(".safetensors"))) if is_pickle(file) else file
    try:
        return Path(hf_hub_download(repository, wanted, revision=revision or None, cache_dir=cache))
    except LocalEntryNotFoundError:
        # The hub cannot be asked; only what was downloaded before is known.
        kept = try_to_load_from_cache(repository, file, revision=revision or None, cache_dir=cache)
        if not (is_pickle(file) and isinstance(kept, str)):
            raise
    except EntryNotFoundError:
        if not is_pickle(file):
            raise
    raise refused(f"The repository {repository} of the hub", [file], SAVE)
