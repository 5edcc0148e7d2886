"""From one string to a `HookedViT`: timm and HuggingFace names, local folders, shipped checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from vit_mechinterp.errors import SpecError, TensorFileError, VitMechInterpError, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.origins import absolute, is_folder
from vit_mechinterp.model.registry import wrap

__all__ = ["checkpoints", "load"]

logger = logging.getLogger(__name__)

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


def load(
    name: str,
    *,
    pretrained: bool = True,
    image_size: int | tuple[int, int] | None = None,
    check: bool = False,
    **options: Any,
) -> HookedViT:
    """Load a ViT by one string, in eval mode.

    Args:
        name: ``"timm/NAME"``; ``"hf/ORG/NAME"``; a folder in either library's format (``"hf/./my-vit"``
            written by ``save_pretrained``, ``"timm/./my-vit"`` with ``config.json`` and
            ``model.safetensors``); or ``"vmi/NAME"`` for a checkpoint that ships with this package.
        pretrained: whether to load weights; without them the architecture is initialised at random.
        image_size: see `wrap`; where a model takes images of any size, what its own preprocessing makes is
            the default.
        check: run the conformance checks as well.
        options: passed on to ``timm.create_model`` or ``from_pretrained``.

    Raises:
        SpecError: the string has another form, or names nothing that can be loaded.
        TensorFileError: the weights are truncated or damaged.
        UnsupportedModelError: no family describes the model.
    """
    library, _, rest = name.partition("/") if isinstance(name, str) else ("", "", "")
    if not rest or library not in ("timm", "hf", "vmi"):
        raise SpecError(
            f"{name!r} is no model string. Write 'timm/NAME', 'hf/ORG/NAME', a folder as 'hf/./FOLDER' or "
            "'timm/./FOLDER', or 'vmi/NAME' with one of "
            f"{', '.join(checkpoints()) or 'no shipped checkpoints'}."
        )
    if library == "vmi":
        if rest not in checkpoints():
            raise SpecError(
                f"This package ships no checkpoint {rest!r}.{suggest(rest, checkpoints())} "
                f"It ships: {', '.join(checkpoints())}."
            )
        library, rest = "timm", str(CHECKPOINTS / rest)
    if options.get("trust_remote_code"):
        raise SpecError(
            f"{name!r}: code from a model repository is never run (trust_remote_code). Load the module "
            "yourself, and wrap it."
        )
    _, _, rest = absolute(f"{library}/{rest}").partition("/")
    build = _load_timm if library == "timm" else _load_transformers
    try:
        module = build(rest, pretrained, options).eval()
    except VitMechInterpError:
        raise
    except SafetensorError as error:
        raise TensorFileError(
            f"{name!r}: its weights are no readable safetensors file (truncated or damaged?): {error}."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        # Missing files, names unknown to the hub, no way to reach it, unknown tags, weights that do not fit.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SpecError(
            f"{name!r} could not be loaded: {reason}. Check the name, or give a local folder as "
            "'hf/./FOLDER' or 'timm/./FOLDER'; pretrained=False needs no weights."
        ) from error
    vit = wrap(module, image_size=image_size, source=name)
    if image_size is None and pretrained and vit.layout.family.any_size(module):
        made = vit.preprocess.geometry
        if made.unknown is None:
            width, height = made.input_size(vit.layout.tokens.image_size[::-1])
            vit = wrap(vit, image_size=(height, width))
    return wrap(vit, check=check)


def checkpoints() -> list[str]:
    """Names of the checkpoints that ship with this package."""
    return sorted(folder.parent.name for folder in CHECKPOINTS.glob("*/config.json"))


def _load_timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    if is_folder(name):
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise SpecError(
                f"{folder} has no config.json; a timm folder holds config.json and model.safetensors."
            )
        if pretrained and not any(folder.glob("*.safetensors")):
            raise SpecError(
                f"{folder} has no model.safetensors, and weights in other formats are not read: they can run "
                "code."
            )
        name = f"local-dir:{folder}"
    elif not timm.is_model(name) and "/" not in name and ":" not in name:
        raise SpecError(f"timm has no model {name!r}.{suggest(name.split('.')[0], timm.list_models())}")
    module: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    return module


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


def _load_transformers(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import transformers

    if is_folder(name) and not (Path(name) / "config.json").is_file():
        raise SpecError(
            f"{name} has no config.json; a transformers folder is one that save_pretrained wrote."
        )
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    architecture = (config.architectures or [""])[0]
    architecture = _VISION_TOWERS.get(architecture, architecture)
    model_class = getattr(transformers, architecture, transformers.AutoModel)
    if pretrained:
        module = _with_weights(model_class, name, options)
    else:
        if architecture in _VISION_TOWERS.values():
            config = getattr(config, "vision_config", config)
        build = model_class.from_config if model_class is transformers.AutoModel else model_class._from_config
        module = build(config, **options)
    assert isinstance(module, nn.Module)
    return module


def _with_weights(model_class: Any, path: str, options: dict[str, Any]) -> nn.Module:
    # Weights come from safetensors alone, so nothing is unpickled and no remote code runs.
    settings = {"use_safetensors": True, **options, "output_loading_info": True}
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
