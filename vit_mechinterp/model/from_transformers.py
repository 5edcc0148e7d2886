"""Models by the HuggingFace hub's names and from ``save_pretrained`` folders, weights from safetensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from vit_mechinterp.errors import SpecError, UnsupportedModelError
from vit_mechinterp.model.origins import is_folder
from vit_mechinterp.model.pickles import pickles_in, refused
from vit_mechinterp.model.registry import foresee
from vit_mechinterp.model.towers import tower_in

__all__ = ["build"]

logger = logging.getLogger(__name__)

SAVE = "vit.module.save_pretrained(FOLDER)"

# Checkpoints of two towers, and the class that loads the vision tower alone.
_VISION_TOWERS = {
    "CLIPModel": "CLIPVisionModelWithProjection",
    "MetaClip2Model": "MetaClip2VisionModelWithProjection",
    "ChineseCLIPModel": "ChineseCLIPVisionModel",
    "CLIPSegModel": "CLIPSegVisionModel",
    "SiglipModel": "SiglipVisionModel",
    "Siglip2Model": "Siglip2VisionModel",
    "OwlViTModel": "OwlViTVisionModel",
    "OwlViTForObjectDetection": "OwlViTVisionModel",
    "Owlv2Model": "Owlv2VisionModel",
    "Owlv2ForObjectDetection": "Owlv2VisionModel",
}
# Options of `from_pretrained` that say where files come from, and how weights are read.
_PLACES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_READING = ("device_map", "ignore_mismatched_sizes", "low_cpu_mem_usage", "use_safetensors", "variant")
_MAKING = ("attn_implementation", "dtype", "torch_dtype")


def build(name: str, pretrained: bool, allow_pickle: bool, options: Mapping[str, Any]) -> nn.Module:
    """Make the model that a checkpoint's configuration names, or the vision tower of a model that holds more.

    Raises:
        SpecError: there is no configuration, or the weights are pickles.
        UnsupportedModelError: no family describes the architecture; no weights were downloaded.
    """
    import transformers

    if options.get("use_safetensors", True) is not True and not allow_pickle:
        raise SpecError("Weights that are no safetensors are pickles; ask for them with allow_pickle=True.")
    folder = Path(name) if is_folder(name) else None
    if folder is not None and not (folder / str(options.get("subfolder", "")) / "config.json").is_file():
        raise SpecError(
            f"{name} has no config.json; a transformers folder is one that save_pretrained wrote."
        )
    places = {key: options[key] for key in _PLACES if key in options}
    making = {key: options[key] for key in _MAKING if key in options}
    changes = {key: options[key] for key in options if key not in (*_PLACES, *_READING, *_MAKING)}
    config = transformers.AutoConfig.from_pretrained(name, **places, **changes, trust_remote_code=False)
    architecture = (config.architectures or [""])[0]
    architecture = _VISION_TOWERS.get(architecture, architecture)
    model_class = getattr(transformers, architecture, transformers.AutoModel)
    # The projection is of the whole model's width; what the vision part's own configuration says is not used.
    width = {}
    if architecture.endswith("VisionModelWithProjection") and hasattr(config, "vision_config"):
        width = {"projection_dim": config.projection_dim}
        config.vision_config.update(width)

    def unloaded() -> nn.Module:
        own = config
        if architecture in _VISION_TOWERS.values():
            own = getattr(config, "vision_config", config)
        make = model_class.from_config if model_class is transformers.AutoModel else model_class._from_config
        module: nn.Module = make(own, **making)
        return module

    tower = None
    try:
        foresee(unloaded)
    except UnsupportedModelError:
        tower = tower_in(unloaded)
        if tower is None:
            raise
    if not pretrained:
        return unloaded() if tower is None else tower.unloaded(making)
    settings = {"use_safetensors": None if allow_pickle else True, **width, **options}
    try:
        if tower is not None:
            kept = {key: value for key, value in settings.items() if key not in changes}
            return tower.loaded(name, model_class, kept, changes)
        return _with_weights(model_class, name, settings)
    except OSError as error:
        if not allow_pickle and (files := _pickles(name, places)):
            raise refused(f"'hf/{name}'", files, SAVE) from error
        raise


def _with_weights(model_class: Any, path: str, options: dict[str, Any]) -> nn.Module:
    settings = {**options, "output_loading_info": True}
    module, info = model_class.from_pretrained(path, **settings)
    missing = sorted(info["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        # The checkpoint has no pooler, and one drawn at random would be the model's output.
        module, info = model_class.from_pretrained(path, **settings, add_pooling_layer=False)
        missing = sorted(info["missing_keys"])
    if missing:
        logger.warning("%s lacks %s, which are initialised at random.", path, ", ".join(missing))
    loaded: nn.Module = module
    return loaded


def _pickles(name: str, places: Mapping[str, Any]) -> list[str]:
    """The pickled weights of a folder without safetensors, or of a repository as far as it can be asked."""
    if is_folder(name):
        folder = Path(name) / str(places.get("subfolder", ""))
        return [] if any(folder.glob("*.safetensors")) else pickles_in(folder)
    from huggingface_hub import file_exists, try_to_load_from_cache

    kept = {key: places[key] for key in ("cache_dir", "revision") if key in places}
    asked = {key: places[key] for key in ("revision", "token") if key in places}
    for file in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if isinstance(try_to_load_from_cache(name, file, **kept), str):
            return [file]
        with suppress(Exception):  # of many kinds, where the hub cannot be reached
            if file_exists(name, file, **asked):
                return [file]
    return []
