"""Two-way heads: a fresh linear layer in place of what a model does with its pooled features.

What a model's adapter says of ``pooled`` decides: a linear layer that reads it is replaced (a classifier, or
the projection of CLIP's vision tower, whose image embeddings become the two logits). A bare transformers
model is put into its type's ``ForImageClassification``; timm resets its own classifier.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vit_mechinterp.errors import UnsupportedModelError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.layout import Port
from vit_mechinterp.model.ports import lookup
from vit_mechinterp.model.registry import wrap

__all__ = ["LABELS", "with_two_way_head"]

LABELS = ("different", "same")
"""Names of the two classes, by their index."""

_CLASSIFIERS_OF = {"vit_mae": "vit", "clip_vision_model": "clip", "siglip_vision_model": "siglip"}
"""Types of transformers whose classifier is another type's: the weights and what they do are the same."""


def with_two_way_head(vit: HookedViT) -> HookedViT:
    """Give a model a fresh head of two classes; its module is changed, or taken apart for another class.

    Raises:
        UnsupportedModelError: it cannot be given one; the message says why.
    """
    size = vit.layout.tokens.image_size
    match vit.layout.family.library:
        case "timm":
            module = _reset(vit)
        case "transformers" if _head_path(vit) is None:
            module = _as_classifier(vit)
        case "transformers" | "torchvision":
            module = _replaced(vit)
        case library:
            raise _no_head(
                vit,
                "that is known for models of timm, transformers and torchvision, and this one is of "
                f"{library}. Load the same weights by one of these",
            )
    made = wrap(module, image_size=size, source=vit.source)
    with torch.no_grad():
        logits = made(made.blank(1))
    if tuple(logits.shape) != (1, len(LABELS)):
        shape = tuple(logits.shape)
        reason = f"with one its output has the shape {shape}, not one logit per class"
        raise _no_head(vit, f"{reason} (does it pool its tokens?)")
    return made


def _no_head(vit: HookedViT, reason: str) -> UnsupportedModelError:
    name = type(vit.module).__name__ + (f" ({vit.source})" if vit.source else "")
    return UnsupportedModelError(f"{name} cannot be given a two-way head: {reason}.")


def _reset(vit: HookedViT) -> nn.Module:
    reset = getattr(vit.module, "reset_classifier", None)
    if reset is None:
        raise _no_head(vit, "it has no reset_classifier")
    reset(len(LABELS))
    return vit.module


def _head_path(vit: HookedViT) -> str | None:
    """Path of the module that reads the pooled features, by the adapter."""
    port = vit.layout.readout.ports.get("pooled")
    return port.path if isinstance(port, Port) and port.side == "input" else None


def _replaced(vit: HookedViT) -> nn.Module:
    """Put a fresh linear layer in the place of the last one of the head."""
    path = _head_path(vit) or "heads"
    head: nn.Module = lookup(vit.module, path)
    if isinstance(head, nn.Identity):
        setattr(vit.module, path, nn.Sequential(nn.Linear(vit.layout.d_model, len(LABELS))))
        return vit.module
    linear = [
        (name, part) for name, part in head.named_modules(prefix=path) if isinstance(part, nn.Linear)
    ]
    if not linear:
        raise _no_head(vit, f"its head, {path}, is a {type(head).__name__} without a linear layer")
    name, last = linear[-1]
    parent, _, own = name.rpartition(".")
    fresh = nn.Linear(last.in_features, len(LABELS), bias=last.bias is not None).to(last.weight)
    setattr(lookup(vit.module, parent) if parent else vit.module, own, fresh)
    config: Any = getattr(vit.module, "config", None)
    if config is not None:
        _name_classes(config)
        if own == "visual_projection":
            config.projection_dim = len(LABELS)
    return vit.module


def _name_classes(config: Any) -> None:
    config.num_labels = len(LABELS)
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: index for index, label in enumerate(LABELS)}


def _as_classifier(vit: HookedViT) -> nn.Module:
    """Put the weights of a bare transformers model into its type's class with a head."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    config: Any = vit.module.config
    own_type = str(config.model_type)
    type_name = _CLASSIFIERS_OF.get(own_type, own_type)
    class_name = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(type_name)
    if own_type == "clip_vision_model":
        class_name = "CLIPVisionModelWithProjection"  # CLIP's classifier averages patches instead
    if not isinstance(class_name, str) or hasattr(vit.module, "cls_classifier"):
        raise _no_head(vit, f"transformers has no image classifier with one head for the type {own_type!r}")
    settings = config.to_dict()
    for name in ("model_type", "architectures"):
        settings.pop(name, None)
    if own_type == "clip_vision_model":
        made = type(config)(**{**settings, "projection_dim": len(LABELS)})
    elif type_name == own_type:
        made = type(config)(**settings)
    elif own_type.endswith("_vision_model"):
        made = transformers.AutoConfig.for_model(type_name, vision_config=settings)
    else:
        made = transformers.AutoConfig.for_model(type_name, **settings)
    _name_classes(made)
    classifier: nn.Module = getattr(transformers, class_name)(made).to(vit.dtype).eval()
    _fill(classifier, vit)
    return classifier


def _fill(classifier: Any, vit: HookedViT) -> None:
    """Copy the bare model's weights into the classifier; every weight but the head's must be there."""
    weights: dict[str, Tensor] = {}
    for name, value in vit.module.state_dict().items():
        weights[name] = weights[name.removeprefix("vision_model.")] = value
    wanted = classifier.state_dict()
    found: dict[str, Tensor] = {}
    for name, place in wanted.items():
        inner = name.removeprefix(f"{classifier.base_model_prefix}.").removeprefix("vision_model.")
        value = weights.get(name, weights.get(inner))
        if value is not None and value.shape == place.shape:
            found[name] = value
    heads = ("classifier.", "visual_projection.")
    missing = [name for name in wanted if name not in found and not name.startswith(heads)]
    if missing:
        listed = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise _no_head(vit, f"{type(classifier).__name__} needs weights that it has not: {listed}")
    classifier.load_state_dict({**wanted, **found})
