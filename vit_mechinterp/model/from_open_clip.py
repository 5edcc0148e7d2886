"""open_clip's vision towers by name, from its folders and from the hub's, with weights from safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.model.origins import is_folder
from vit_mechinterp.model.pickles import SAVE_FILE, is_pickle, pickles_in, refused
from vit_mechinterp.model.registry import foresee

__all__ = ["build"]

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
"""What open_clip reads before any other file of a folder, also where there are pickles."""


def build(name: str, pretrained: bool, allow_pickle: bool, options: Mapping[str, Any]) -> nn.Module:
    """Make the vision tower of a model of two towers; the text tower is made, and dropped.

    Args:
        name: ``ViT-B-32``; with weights as ``ViT-B-32/laion2b_s34b_b79k``; ``hf-hub:ORG/NAME``; or a folder
            with ``open_clip_config.json`` and ``open_clip_model.safetensors``.
        pretrained: whether to load weights.
        allow_pickle: whether to let open_clip read its weights from pickles.
        options: for ``open_clip.create_model``, and ``checkpoint_path``, a safetensors file.

    Raises:
        SpecError: open_clip is not installed, or knows no such name, or the weights are pickles.
        UnsupportedModelError: no family describes the vision tower; nothing was downloaded.
    """
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise SpecError(f"'open_clip/{name}' needs open_clip: pip install open_clip_torch.") from error

    from open_clip.model import _build_vision_tower

    options = {"pretrained_text": False, **options}
    config = _config(name)
    if (vision := config.get("vision_cfg")) is None:
        raise SpecError(f"'open_clip/{name}' has no vision_cfg in its configuration, so it has no tower.")
    foresee(lambda: _build_vision_tower(config["embed_dim"], {**vision, "timm_model_pretrained": False}))
    schema = _schema(name)
    file = options.pop("checkpoint_path", None)
    if file is not None and is_pickle(file):
        raise refused(f"checkpoint_path={str(file)!r}", [Path(file).name], *SAVE_FILE)
    if file is not None or not pretrained:
        tower: nn.Module = open_clip.create_model(schema, load_weights=False, **options).visual
        return tower if file is None else _with_weights(tower, str(file))
    if ":" in schema:
        tower = _from_folder(schema, allow_pickle, options).visual
    else:
        tower = _by_tag(name, allow_pickle, options).visual
    return tower


def _with_weights(tower: nn.Module, file: str) -> nn.Module:
    """Read a tower's own weights, or those of a model of two towers."""
    from safetensors.torch import load_file

    weights = load_file(file)
    own = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
    tower.load_state_dict(own or weights)
    return tower


def _schema(name: str) -> str:
    """The name as open_clip's own functions take it, without the weights' tag."""
    if is_folder(name):
        return f"local-dir:{name}"
    return name if ":" in name else name.partition("/")[0]


def _config(name: str) -> dict[str, Any]:
    import open_clip
    from open_clip.factory import get_model_config

    schema = _schema(name)
    if is_folder(name) and not (Path(name) / "open_clip_config.json").is_file():
        raise SpecError(
            f"{name} has no open_clip_config.json; a folder of open_clip's holds it and {FILES[0]}."
        )
    if ":" not in schema and schema not in (known := open_clip.list_models()):
        raise SpecError(f"open_clip has no model {schema!r}.{suggest(schema, known)}")
    try:
        config: dict[str, Any] = get_model_config(schema)
    except json.JSONDecodeError as error:
        raise SpecError(f"{name}: its open_clip_config.json cannot be read: {error}.") from error
    return config


def _from_folder(schema: str, allow_pickle: bool, options: Mapping[str, Any]) -> Any:
    """The model of a folder, or of a repository of the hub, whose safetensors file is downloaded."""
    import open_clip

    place, _, identifier = schema.partition(":")
    if place == "hf-hub" and not allow_pickle:
        _on_hub(identifier, options)
    folder = Path(identifier)
    if place == "local-dir" and not any((folder / one).is_file() for one in FILES):
        if (files := pickles_in(folder)) and not allow_pickle:
            raise refused(identifier, files, *SAVE_FILE)
        if not files and not any(folder.glob("*.safetensors")):
            raise SpecError(f"{identifier} has no {FILES[0]}; pretrained=False needs no weights.")
    return open_clip.create_model(schema, require_pretrained=True, **options)


def _by_tag(name: str, allow_pickle: bool, options: Mapping[str, Any]) -> Any:
    """The model of one of open_clip's names with one of its weights."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    architecture, _, tag = name.partition("/")
    tags = list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        fault = f"has no weights {tag!r}.{suggest(tag, tags)}" if tag else "has weights of several trainings."
        raise SpecError(
            f"open_clip's {architecture} {fault} Write 'open_clip/{architecture}/TAG' with one of "
            f"{', '.join(tags) or 'none: open_clip has no weights of it'}; pretrained=False needs no weights."
        )
    entry = get_pretrained_cfg(architecture, tag)
    # Weights of OpenAI's training need the activation that they were trained with, whatever the name says.
    options = {"force_quick_gelu": bool(entry.get("quick_gelu")), "require_pretrained": True, **options}
    if allow_pickle:
        return open_clip.create_model(architecture, pretrained=tag, **options)
    repository = str(entry.get("hf_hub") or "").rstrip("/")
    if not repository:
        raise refused(f"'open_clip/{name}'", [Path(str(entry.get("url"))).name], *SAVE_FILE)
    images = {key: entry[key] for key in _PREPROCESSING if key in entry}
    options = {"force_preprocess_cfg": images, **options}
    return open_clip.create_model(architecture, pretrained=_on_hub(repository, options), **options)


_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def _on_hub(repository: str, options: Mapping[str, Any]) -> str:
    """A repository's safetensors file in the cache, downloaded if need be."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return hf_hub_download(repository, FILES[0], cache_dir=options.get("cache_dir"))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        pickle = "open_clip_pytorch_model.bin"
        raise refused(f"The repository {repository} of the hub", [pickle], *SAVE_FILE) from error
