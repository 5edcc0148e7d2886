"""torchvision's ViTs by name, with weights from a safetensors file or, on request, from its pickles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.model.pickles import SAVE_FILE, is_pickle, refused
from vit_mechinterp.model.registry import foresee

__all__ = ["build", "weights_of"]


def build(name: str, pretrained: bool, allow_pickle: bool, options: Mapping[str, Any]) -> nn.Module:
    """Make a model by its builder's name, ``vit_b_16``, or with weights as ``vit_b_16.IMAGENET1K_V1``.

    torchvision keeps its weights as pickles alone. With ``allow_pickle`` they are downloaded and read by
    torch's reader of tensors (``weights_only=True``); ``checkpoint_path`` names a safetensors file instead.

    Raises:
        SpecError: torchvision knows no such name, or the weights are pickles.
        UnsupportedModelError: no family describes the architecture; nothing was downloaded.
    """
    from torchvision import models

    weights = weights_of(name)
    made = {key: value for key, value in options.items() if key != "checkpoint_path"}
    file = options.get("checkpoint_path")
    if weights is not None and (pretrained or file is not None or "." in name):
        own = {"num_classes": len(weights.meta["categories"]), "image_size": weights.meta["min_size"][0]}
        made = {**own, **made}
    builder = name.partition(".")[0]

    def unloaded() -> nn.Module:
        module: nn.Module = models.get_model(builder, weights=None, **made)
        return module

    foresee(unloaded)
    if file is None and (not pretrained or weights is None):
        return unloaded()
    if file is None and not allow_pickle:
        raise refused(f"'torchvision/{name}'", [Path(weights.url).name], *SAVE_FILE)
    module = unloaded()
    if file is None:
        module.load_state_dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
        return module
    if is_pickle(file):
        raise refused(f"checkpoint_path={str(file)!r}", [Path(file).name], *SAVE_FILE)
    from safetensors.torch import load_model

    load_model(module, str(file))
    return module


def weights_of(name: str) -> Any:
    """torchvision's entry for the weights that a name names, or its default; None if it has none.

    Raises:
        SpecError: torchvision knows no such model or weights.
    """
    from torchvision import models

    builder, _, tag = name.partition(".")
    if builder not in (known := models.list_models(module=models)):
        raise SpecError(f"torchvision has no model {builder!r}.{suggest(builder, known)}")
    weights = models.get_model_weights(builder)
    if tag and tag not in weights.__members__:
        raise SpecError(
            f"torchvision has no weights {tag!r} of {builder}.{suggest(tag, weights.__members__)} It has: "
            f"{', '.join(weights.__members__)}."
        )
    return weights[tag] if tag else getattr(weights, "DEFAULT", None)
